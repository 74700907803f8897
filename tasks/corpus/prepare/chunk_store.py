"""Documents between the scan and the tokenizer, in chunks small enough to hold in memory.

`00000-000.arrow` holds the documents of chunk 0 of task 0, `00000-000.rejects.arrow` its records that gave none, and
`00000-000.json`, written last, commits both and counts them. `00000.json` does the same for the whole task.
`00000-000.bands-KEY` has the MinHash bands of the documents.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks import scratch, sources
from tasks.corpus import files, shards, source_versions
from tasks.corpus.records import Document, Reject
from tasks.settings import Domain

CHUNK_CHARS = 1 << 24  # characters of text in a chunk: bounds the memory of scan and tokenise
CHUNK_RECORDS = 1 << 17

_ORIGIN: list[tuple[str, pa.DataType]] = [
    ("record", pa.uint64()),  # number in the task
    ("piece", pa.uint32()),
    ("source", pa.string()),
    ("row", pa.uint64()),  # counted from the piece's first
]
DOCUMENTS = pa.schema(
    [
        *_ORIGIN,
        ("text", pa.large_string()),
        ("doc_id", pa.binary(16)),
        ("ids", pa.large_list(pa.uint32())),
        ("loss_mask", pa.large_list(pa.bool_())),
    ]
)
REJECTS = pa.schema(
    [*_ORIGIN, ("rule", pa.string()), ("bad", pa.bool_()), ("detail", pa.string()), ("text", pa.large_string())]
)


@dataclass
class Chunk:
    """Records of a task in the order they were read: one list per column."""

    documents: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in DOCUMENTS.names})
    rejects: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in REJECTS.names})
    chars: int = 0

    @property
    def records(self) -> int:
        return len(self.documents["record"]) + len(self.rejects["record"])

    @property
    def is_full(self) -> bool:
        return self.chars >= CHUNK_CHARS or self.records >= CHUNK_RECORDS

    def add(self, document: Document, *, record: int, piece: int, doc_id: bytes) -> None:
        row = (record, piece, document.source, document.row, document.text, doc_id, document.ids, document.loss_mask)
        self._append(self.documents, row)
        self.chars += len(document.text)

    def reject(self, reject: Reject, *, record: int, piece: int, text: str | None = None) -> None:
        row = (record, piece, reject.source, reject.row, reject.rule, reject.bad, reject.detail, text)
        self._append(self.rejects, row)
        self.chars += len(text or "")

    def drop(self, dropped: dict[int, Reject]) -> None:
        """Turn documents, by their position among the documents, into rejects."""
        documents = self.documents
        for i, reject in dropped.items():
            self.reject(reject, record=documents["record"][i], piece=documents["piece"][i])
        for name, column in documents.items():
            documents[name] = [value for i, value in enumerate(column) if i not in dropped]
        by_record = sorted(range(len(self.rejects["record"])), key=self.rejects["record"].__getitem__)
        self.rejects = {name: [column[i] for i in by_record] for name, column in self.rejects.items()}

    @staticmethod
    def _append(columns: dict[str, list[Any]], row: tuple[Any, ...]) -> None:
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)


def commit(folder: Path, task: int, *, index: int, chunk: Chunk) -> dict[str, Any]:
    """Write a chunk and its summary, which is returned: records, documents and rejects by rule."""
    path = chunk_path(folder, task, index)
    write_table(path, pa.table(chunk.documents, schema=DOCUMENTS))
    write_table(path.with_suffix(".rejects.arrow"), pa.table(chunk.rejects, schema=REJECTS))
    rules: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    examples: dict[str, list[Any]] = {}  # the first bad record of each rule: [piece, source, row, detail]
    columns = (chunk.rejects[name] for name in ("rule", "bad", "piece", "source", "row", "detail"))
    for rule, is_bad, *example in zip(*columns, strict=True):
        (bad if is_bad else rules)[rule] += 1
        if is_bad:
            examples.setdefault(rule, example)
    documents = len(chunk.documents["record"])
    summary = {"records": chunk.records, "documents": documents, "rules": rules, "bad": bad, "examples": examples}
    scratch.write_json(path.with_suffix(".json"), summary)
    return summary


def commit_task(folder: Path, task: int, *, chunks: list[dict[str, Any]], rows: list[int]) -> None:
    """Write the summary of a whole task; `rows` are the rows of each of its pieces."""
    summary: dict[str, Any] = {"records": 0, "documents": 0, "rules": Counter(), "bad": Counter(), "examples": {}}
    for chunk in chunks:
        summary = {
            **{name: summary[name] + chunk[name] for name in ("records", "documents")},
            **{name: summary[name] + Counter(chunk[name]) for name in ("rules", "bad")},
            "examples": {**chunk["examples"], **summary["examples"]},
        }
    scratch.write_json(folder / f"{task:05d}.json", {**summary, "rows": rows})


def summary_of(folder: Path, task: int) -> dict[str, Any] | None:
    """The summary of a task; None if its scan is not finished."""
    path = folder / f"{task:05d}.json"
    return json.loads(path.read_text()) if path.exists() else None


def chunk_summaries(folder: Path, task: int) -> list[dict[str, Any]]:
    """Summaries of the committed chunks of a task, without a gap from the first."""
    return [json.loads(path.with_suffix(".json").read_text()) for path in chunk_paths(folder, task)]


def chunk_path(folder: Path, task: int, index: int) -> Path:
    """The document file of a chunk."""
    return folder / f"{task:05d}-{index:03d}.arrow"


def chunk_paths(folder: Path, task: int) -> list[Path]:
    """The document files of the committed chunks of a task, in order, without a gap from the first."""
    paths: list[Path] = []
    while (path := chunk_path(folder, task, len(paths))).with_suffix(".json").exists():
        paths.append(path)
    return paths


def documents(path: Path) -> pa.Table:
    """The documents of a chunk, or whatever else `write_table` wrote."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        return file.read_all()


def rejects(path: Path) -> pa.Table:
    """The records of a chunk that gave no document; `path` is its document file."""
    return documents(path.with_suffix(".rejects.arrow"))


def write_bands(path: Path, bands: NDArray[np.uint64]) -> None:
    """Write the MinHash bands of a chunk's documents, uint64 [documents, bands]."""
    write_table(path, pa.table({"bands": shards.to_binary(bands.astype("<u8", copy=False))}))


def discard(folder: Path, task: int) -> None:
    """Delete all chunks of a task, and its summary."""
    for path in folder.glob(f"{task:05d}[-.]*"):
        path.unlink(missing_ok=True)


@contextmanager
def reading(
    folder: Path,
    task: int,
    *,
    part: Domain,
    name: str,
    fetched: sources.Fetched | None,
    versions: source_versions.Versions,
) -> Iterator[None]:
    """Check around the block that reads a task that its files have the recorded versions.

    Chunks that were read from files with other stamps are deleted first.

    Raises:
        SourceError: a file changed before or during the block; all chunks of the task are deleted.
    """
    if fetched is None:
        yield
        return
    path = folder / f"{task:05d}.stamps.json"
    try:
        with (
            source_versions.naming(name),
            fetched.unchanged(versions[name], fix=source_versions.fix(part)) as stamps,
        ):
            if not path.exists() or json.loads(path.read_text()) != stamps:
                discard(folder, task)
                scratch.write_json(path, stamps)
            yield
    except sources.SourceError:
        discard(folder, task)
        raise


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow file, compressed."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with files.replacing(path) as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write_table(table)
