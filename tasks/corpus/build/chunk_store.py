"""Documents between the scan and the tokenizer, in files small enough to hold in memory.

A task's records lie in chunks. `00000-000.arrow` holds the documents of chunk 0 of task 0, `00000-000.rejects.arrow`
the records that gave none, and `00000-000.json`, written last, commits both. `00000.json` says that the task is whole.
`00000-000.bands-KEY` has the bands of the documents, by which near-duplicates are found.
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
from tasks.corpus import files, source_versions
from tasks.corpus.records import Document, Reject
from tasks.settings import Domain

CHUNK_CHARS = 1 << 24  # characters of text in a chunk: bounds the memory of scan and tokenise
CHUNK_RECORDS = 1 << 17

_PLACE: list[tuple[str, pa.DataType]] = [
    ("record", pa.uint64()),  # number in the task
    ("piece", pa.uint32()),
    ("source", pa.string()),
    ("row", pa.uint64()),  # counted from the piece's first
]
DOCUMENTS = pa.schema(
    [*_PLACE, ("text", pa.large_string()), ("doc_id", pa.binary(16)), ("ids", pa.large_list(pa.uint32()))]
)
REJECTS = pa.schema(
    [*_PLACE, ("rule", pa.string()), ("bad", pa.bool_()), ("detail", pa.string()), ("text", pa.large_string())]
)
_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")


@dataclass
class Chunk:
    """Records of a task, as they come: a column each, by name."""

    documents: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in DOCUMENTS.names})
    rejects: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in REJECTS.names})
    chars: int = 0

    @property
    def records(self) -> int:
        return len(self.documents["record"]) + len(self.rejects["record"])

    @property
    def is_full(self) -> bool:
        return self.chars >= CHUNK_CHARS or self.records >= CHUNK_RECORDS

    def document(self, document: Document, *, record: int, piece: int, doc_id: bytes) -> None:
        self._place(self.documents, document, record=record, piece=piece)
        self.documents["text"].append(document.text)
        self.documents["doc_id"].append(doc_id)
        self.documents["ids"].append(document.ids)
        self.chars += len(document.text)

    def reject(self, reject: Reject, *, record: int, piece: int, text: str | None = None) -> None:
        self._place(self.rejects, reject, record=record, piece=piece)
        for name, value in (("rule", reject.rule), ("bad", reject.bad), ("detail", reject.detail), ("text", text)):
            self.rejects[name].append(value)
        self.chars += len(text or "")

    def drop(self, dropped: dict[int, Reject]) -> None:
        """Turn documents, by their place among the documents, into rejects after all."""
        documents = self.documents
        for i, reject in dropped.items():
            self.reject(reject, record=documents["record"][i], piece=documents["piece"][i])
        for name, column in documents.items():
            documents[name] = [value for i, value in enumerate(column) if i not in dropped]
        by_record = sorted(range(len(self.rejects["record"])), key=self.rejects["record"].__getitem__)
        self.rejects = {name: [column[i] for i in by_record] for name, column in self.rejects.items()}

    @staticmethod
    def _place(columns: dict[str, list[Any]], found: Document | Reject, *, record: int, piece: int) -> None:
        for name, value in (("record", record), ("piece", piece), ("source", found.source), ("row", found.row)):
            columns[name].append(value)


def commit(folder: Path, task: int, *, index: int, chunk: Chunk) -> dict[str, Any]:
    """Write a chunk and its account, which is returned: records, documents and records by rule."""
    stem = f"{task:05d}-{index:03d}"
    table = pa.table(chunk.documents, schema=DOCUMENTS)
    _write(folder / f"{stem}.arrow", table)
    _write(folder / f"{stem}.rejects.arrow", pa.table(chunk.rejects, schema=REJECTS))
    rejects = chunk.rejects
    bad = Counter(rule for rule, is_bad in zip(rejects["rule"], rejects["bad"], strict=True) if is_bad)
    rules = Counter(rule for rule, is_bad in zip(rejects["rule"], rejects["bad"], strict=True) if not is_bad)
    account = {
        "records": chunk.records,
        "documents": len(table),
        "rules": dict(rules),
        "bad": dict(bad),
        "examples": _examples(chunk.rejects),
    }
    scratch.write_json(folder / f"{stem}.json", account)
    return account


def sign(path: Path, bands: NDArray[np.uint64]) -> None:
    """Write the bands of a chunk's documents, uint64 [documents, bands], to one of `band_paths`."""
    content = [None, pa.py_buffer(np.ascontiguousarray(bands, dtype="<u8"))]
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(8 * bands.shape[1]), len(bands), content)
    _write(path, pa.table({"bands": column}))


def committed(folder: Path, task: int) -> list[dict[str, Any]]:
    """Accounts of the chunks of a task that are there, without a gap from the first."""
    found: list[dict[str, Any]] = []
    while (path := folder / f"{task:05d}-{len(found):03d}.json").exists():
        found.append(json.loads(path.read_text()))
    return found


def finish(folder: Path, task: int, *, chunks: list[dict[str, Any]], rows: list[int]) -> None:
    """Write the account of a whole task; `rows` are the rows of each of its pieces."""
    total: dict[str, Counter[str]] = {"rules": Counter(), "bad": Counter()}
    examples: dict[str, list[Any]] = {}
    for chunk in chunks:
        for kind, counts in total.items():
            counts.update(chunk[kind])
        examples = {**chunk["examples"], **examples}
    account = {
        "chunks": len(chunks),
        "records": sum(chunk["records"] for chunk in chunks),
        "documents": sum(chunk["documents"] for chunk in chunks),
        **{kind: dict(counts) for kind, counts in total.items()},
        "examples": examples,
        "rows": rows,
    }
    scratch.write_json(folder / f"{task:05d}.json", account)


def discard(folder: Path, task: int) -> None:
    """Delete all chunks of a task, and its account."""
    for path in folder.glob(f"{task:05d}[-.]*"):
        path.unlink(missing_ok=True)


@contextmanager
def from_recorded_sources(
    folder: Path,
    task: int,
    *,
    part: Domain,
    name: str,
    fetched: sources.Fetched | None,
    versions: source_versions.Versions,
) -> Iterator[None]:
    """Guard the block that reads a task: its files have the recorded versions, and so had those of earlier chunks.

    Raises:
        SourceError: a file changed before or meanwhile; no chunk of the task is kept.
    """
    if fetched is None:
        yield
        return
    path = folder / f"{task:05d}.stamps.json"
    try:
        with (
            source_versions.naming(name),
            fetched.unchanged(versions[name], mend=source_versions.fix(part)) as stamps,
        ):
            if not path.exists() or json.loads(path.read_text()) != stamps:
                discard(folder, task)  # its chunks may hold other bytes
                scratch.write_json(path, stamps)
            yield
    except sources.SourceError:
        discard(folder, task)
        raise


def account(folder: Path, task: int) -> dict[str, Any] | None:
    """The account of a task; None if it isn't whole."""
    path = folder / f"{task:05d}.json"
    return json.loads(path.read_text()) if path.exists() else None


def chunk_paths(folder: Path, task: int, *, chunks: int) -> list[Path]:
    """The document files of a task, in order."""
    return [folder / f"{task:05d}-{index:03d}.arrow" for index in range(chunks)]


def band_paths(folder: Path, task: int, *, chunks: int, key: str) -> list[Path]:
    """The files of a task's bands, in order; `key` names how they were made."""
    return [path.with_suffix(f".bands-{key}") for path in chunk_paths(folder, task, chunks=chunks)]


def documents(path: Path) -> pa.Table:
    """The documents of a chunk."""
    return _read(path)


def rejects(path: Path) -> pa.Table:
    """The records of a chunk that gave no document; `path` is its document file."""
    return _read(path.with_suffix(".rejects.arrow"))


def _examples(rejects: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The first bad record of each rule: [piece, source, row, detail]."""
    found: dict[str, list[Any]] = {}
    for i, rule in enumerate(rejects["rule"]):
        if rejects["bad"][i]:
            found.setdefault(rule, [rejects[name][i] for name in ("piece", "source", "row", "detail")])
    return found


def _write(path: Path, table: pa.Table) -> None:
    with files.replacing(path) as file, pa.ipc.new_file(file, table.schema, options=_COMPRESSED) as writer:
        writer.write_table(table)


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        return file.read_all()


def batches(folder: Path, task: int, *, chunks: int) -> Iterator[pa.Table]:
    """The documents of a task, chunk by chunk."""
    for path in chunk_paths(folder, task, chunks=chunks):
        yield documents(path)
