"""Text: a file is a document."""

from __future__ import annotations

from typing import IO

from tasks.corpus.readers import streams
from tasks.corpus.readers.base import FileReader, Piece, Records
from tasks.corpus.records import NUL_RULE, Document, Reject, nul_fault


class TextReader(FileReader):
    """Files of UTF-8, with or without a byte order mark. A file with a NUL byte is no text."""

    def records(self, file: IO[bytes], piece: Piece) -> Records:
        name = piece.path
        try:
            content = bytearray()  # one read of max_record_bytes would set them all aside
            while len(content) <= self.max_record_bytes and (block := file.read(streams.BLOCK)):
                content += block
            if len(content) > self.max_record_bytes:
                yield self.over_long(name, 0)
                return 1
            text = content.decode("utf-8-sig")
            if fault := nul_fault(text):
                yield Reject(rule=NUL_RULE, source=name, row=0, detail=f"{fault}: convert it to UTF-8")
            else:
                yield Document(text=text, source=name, row=0)
        except UnicodeDecodeError as error:
            yield Reject(rule="invalid UTF-8", source=name, row=0, detail=str(error))
        except streams.CORRUPT as error:
            yield Reject(rule="corrupt stream", source=name, row=0, detail=str(error))
        return 1
