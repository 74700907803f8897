"""JSON lines, plain or compressed; plain ones are cut into byte ranges."""

from __future__ import annotations

from typing import IO, Any

from tasks.corpus.readers import streams
from tasks.corpus.readers.base import FileReader, Piece, Records
from tasks.corpus.records import NUL_RULE, Document, Reject, stray_nul_fault


class JsonlReader(FileReader):
    """One object a line, its text under the key `text_field`; blank lines are no records, but count as rows."""

    def pieces(self, name: str, *, task_bytes: int) -> list[Piece]:
        if streams.codec_of(name) or not self.is_cuttable(name, task_bytes=task_bytes):
            return [Piece(name)]
        size = self.bytes_of(name)
        return [Piece(name, start, min(start + task_bytes, size)) for start in range(0, size, task_bytes)]

    def records(self, file: IO[bytes], piece: Piece) -> Records:
        name = piece.path
        import orjson

        loads, readline, key, limit = orjson.loads, file.readline, self.field, self.max_record_bytes
        row, at = 0, piece.start
        if at:  # the line that holds the byte before is the previous piece's
            file.seek(at - 1)
            at += _skip_line(file, most=None if piece.stop is None else piece.stop - at + 1) - 1
        while piece.stop is None or at < piece.stop:
            try:
                line = readline(limit + 1)
                at += len(line)
                if is_over_long := len(line) > limit and line[-1] != 10:
                    at += _skip_line(file)
            except streams.CORRUPT as error:  # the rest of the file is lost; how much that is cannot be known
                detail = f"{error}; nothing after this row was read"
                yield Reject(rule="corrupt stream", source=name, row=row, detail=detail)
                return row + 1
            if is_over_long:
                yield self.over_long(name, row)
            elif not line:
                break
            elif not line.isspace():
                try:
                    record = loads(line)
                except ValueError as error:  # JSONDecodeError is one; it also covers invalid UTF-8
                    yield Reject(rule="invalid JSON", source=name, row=row, detail=str(error))
                else:
                    text = record.get(key) if type(record) is dict else None
                    if type(text) is str:
                        if "\0" in text and (fault := stray_nul_fault(text)):
                            yield Reject(rule=NUL_RULE, source=name, row=row, detail=fault)
                        else:
                            yield Document(text=text, source=name, row=row)
                    else:
                        yield _without_text(record, key, name=name, row=row)
            row += 1
        return row


def _skip_line(file: IO[bytes], *, most: int | None = None) -> int:
    """Read to the end of a line, or until `most` bytes are read, without keeping it; returns how many that were."""
    read = 0
    while most is None or read < most:
        line = file.readline(streams.BLOCK)
        read += len(line)
        if not line or line[-1] == 10:
            break
    return read


def _without_text(record: Any, key: str, *, name: str, row: int) -> Reject:
    if not isinstance(record, dict):
        rule, detail = "not an object", f"a JSON {type(record).__name__}, not an object"
    elif key not in record:
        rule, detail = "missing field", f"no {key!r}; the record has {', '.join(map(repr, list(record)[:8]))}"
    elif record[key] is None:
        rule, detail = "null field", f"{key!r} is null"
    else:
        rule, detail = "not a string", f"{key!r} is a {type(record[key]).__name__}"
    return Reject(rule=rule, source=name, row=row, detail=detail)
