"""Documents out of files: text, jsonl, parquet and MediaWiki dumps, through fsspec, compressed or not.

A record that cannot be read is counted under the rule it breaks, with an example, and reading goes on; whether that
was too many is judged per domain (`Tally.judge`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from tasks.corpus import mediawiki, streams
from tasks.corpus.records import CorpusError, Document, Tally
from tasks.sources import Fetched


def documents(fetched: Fetched, *, format: str, text_field: str, tally: Tally) -> Iterator[Document]:
    """Every readable document of a domain's files, in the order of the files and inside them.

    Args:
        fetched: the files.
        format: text (a file is a document), jsonl, parquet or mediawiki.
        text_field: the jsonl key or parquet column.
        tally: counts `read` and bad records.
    """
    for path in fetched.paths:
        name = fetched.name_of(path)
        if streams.codec_of(path) and fetched.fs.size(path) == 0:  # which gzip takes for an empty stream
            tally.rules["read"] += 1
            tally.reject("corrupt stream", name, 0, detail="a compressed file of 0 bytes")
            continue
        with fetched.fs.open(path, "rb") as opened:
            raw = streams.guard(opened, path)
            if format == "parquet":
                yield from _parquet(raw, name, column=text_field, tally=tally)
                continue
            file = streams.decompress(raw, path)
            if format == "text":
                yield from _text(file, name, tally=tally)
            elif format == "jsonl":
                yield from _jsonl(file, name, key=text_field, tally=tally)
            else:
                yield from mediawiki.documents(file, name, tally=tally)


def _text(file: IO[bytes], path: str, *, tally: Tally) -> Iterator[Document]:
    tally.rules["read"] += 1
    try:
        yield Document(text=file.read().decode("utf-8-sig"), source=path, row=0)
    except UnicodeDecodeError as error:
        tally.reject("invalid UTF-8", path, 0, detail=str(error))
    except streams.CORRUPT as error:
        tally.reject("corrupt stream", path, 0, detail=str(error))


def _jsonl(file: IO[bytes], path: str, *, key: str, tally: Tally) -> Iterator[Document]:
    import orjson

    row = 0
    lines = iter(file)
    while True:
        try:
            line = next(lines, None)
        except streams.CORRUPT as error:  # the rest of the file is lost; how much that is cannot be known
            tally.rules["read"] += 1
            tally.reject("corrupt stream", path, row, detail=f"{error}; nothing after this row was read")
            return
        if line is None:
            return
        if line.strip():
            tally.rules["read"] += 1
            try:
                text = _field(orjson.loads(line), key)
            except ValueError as error:  # JSONDecodeError is one; it also covers invalid UTF-8
                tally.reject(_rule(error), path, row, detail=str(error))
            else:
                yield Document(text=text, source=path, row=row)
        row += 1


def _field(record: Any, key: str) -> str:
    if not isinstance(record, dict):
        raise _FieldError("not an object", f"a JSON {type(record).__name__}, not an object")
    if key not in record:
        raise _FieldError("missing field", f"no {key!r}; the record has {', '.join(map(repr, list(record)[:8]))}")
    return _string(record[key], key)


def _string(value: Any, key: str) -> str:
    if value is None:
        raise _FieldError("null field", f"{key!r} is null")
    if not isinstance(value, str):
        raise _FieldError("not a string", f"{key!r} is a {type(value).__name__}")
    return value


class _FieldError(ValueError):
    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(detail)
        self.rule = rule


def _rule(error: ValueError) -> str:
    return error.rule if isinstance(error, _FieldError) else "invalid JSON"


def _parquet(file: IO[bytes], path: str, *, column: str, tally: Tally) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise CorpusError(f"{path}: has no column {column!r}; set text_field to one of {table.schema_arrow.names}")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0):
                tally.rules["read"] += 1
                try:
                    text = _string(value.as_py(), column)
                except UnicodeDecodeError as error:
                    tally.reject("invalid UTF-8", path, row, detail=str(error))
                except _FieldError as error:
                    tally.reject(error.rule, path, row, detail=str(error))
                else:
                    yield Document(text=text, source=path, row=row)
                row += 1
    except (pa.ArrowInvalid, OSError) as error:  # the index is at the end of the file, so nothing of it can be trusted
        raise CorpusError(f"{path}: not a readable parquet file ({error}); fetch it again") from error
