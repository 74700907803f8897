"""Read all of a source as the corpus stage does: task by task, rows counted on over the pieces of a file."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from tasks.corpus.readers.base import Reader
from tasks.corpus.readers.registry import open_reader
from tasks.corpus.records import Document, Record, Reject
from tasks.settings.corpus import Domain

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def lines(texts: list[str]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def reader_of(source: Path | str, *, format: str = "jsonl", max_record_bytes: int = 1 << 20, **fields: Any) -> Reader:
    """The reader of a path or source."""
    text = f"dir:{source}" if isinstance(source, Path) else source
    domain = Domain(source=text, format=format, license="CC0-1.0", **fields)
    return open_reader(domain, Path(tempfile.mkdtemp()), max_record_bytes=max_record_bytes)


def records_of(reader: Reader, *, task_bytes: int = 1 << 30) -> list[Record]:
    """All records of all tasks, with the rows they have in their files."""
    result: list[Record] = []
    rows: Counter[str] = Counter()
    for piece in (piece for task in reader.tasks(task_bytes=task_bytes) for piece in task):
        records = reader.read(piece)
        while True:
            try:
                record = next(records)
            except StopIteration as end:
                rows[piece.path] += end.value
                break
            result.append(dataclasses.replace(record, row=record.row + rows[piece.path]))
    return result


def read(source: Path | str, **options: Any) -> tuple[list[Document], list[Reject]]:
    """Documents and rejects of a source, in order."""
    result = records_of(reader_of(source, **options))
    return [r for r in result if isinstance(r, Document)], [r for r in result if isinstance(r, Reject)]
