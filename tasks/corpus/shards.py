"""Shards: Arrow IPC streams of one record batch, written whole or not at all, each with a sidecar that commits it.

| column    | type                      |                                                                     |
|-----------|---------------------------|---------------------------------------------------------------------|
| input_ids | large_list<uint16|uint32> | EOS included; uint16 if the vocabulary fits                         |
| doc_id    | fixed_size_binary(16)     | xxh3-128 of the normalised text                                     |
| source    | dictionary<int32, string> | file the document came from                                         |
| row       | uint64                    | its line, row or page there                                         |

The stream format is what `datasets.Dataset.from_file` opens. Not compressed, so that readers map it.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

FORMAT = "moeforge-shard-1"
FIRST_IDS = 32
TMP = ".tmp-"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A tokenised document."""

    ids: NDArray[Any]
    doc_id: bytes
    source: str
    row: int
    text_bytes: int


def write(path: Path, rows: list[Row], *, dtype: type[np.unsignedinteger], metadata: dict[str, str]) -> dict[str, Any]:
    """Write a shard and then its sidecar; return the sidecar. A reader finds the old files, the new ones, or none.

    `metadata` goes into the schema; its `task_key` names everything that the shard's bytes depend on.
    """
    flat = np.concatenate([row.ids for row in rows])
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    arrays = {
        "input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat)),
        "doc_id": pa.array([row.doc_id for row in rows], pa.binary(16)),
        "source": pa.array([row.source for row in rows]).dictionary_encode(),
        "row": pa.array([row.row for row in rows], pa.uint64()),
    }
    if flat.dtype != dtype:
        raise TypeError(f"{path}: ids are {flat.dtype}, not {dtype}")
    facts = {**metadata, "documents": str(len(rows)), "tokens": str(len(flat))}
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
    batch = batch.replace_schema_metadata(facts)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = memoryview(sink.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, content)
    sidecar = {
        "path": str(Path(*path.parts[-3:])),
        "size": len(content),
        "documents": len(rows),
        "tokens": len(flat),
        "text_bytes": sum(row.text_bytes for row in rows),
        "min_id": int(flat.min()),
        "max_id": int(flat.max()),
        "first_ids": flat[:FIRST_IDS].tolist(),
        "first_doc_id": rows[0].doc_id.hex(),
        "last_doc_id": rows[-1].doc_id.hex(),
        "sha256": hashlib.sha256(content).hexdigest(),
        "xxh3_128": xxhash.xxh3_128_hexdigest(content),
        "task_key": metadata["task_key"],
    }
    _replace(sidecar_of(path), memoryview((json.dumps(sidecar, indent=2, sort_keys=True) + "\n").encode()))
    return sidecar


def committed(path: Path, task_key: str) -> dict[str, Any] | None:
    """The sidecar of a shard that was finished for this very task; None if there is work to do."""
    try:
        sidecar = json.loads(sidecar_of(path).read_text())
        size = path.stat().st_size
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return sidecar if sidecar.get("task_key") == task_key and sidecar.get("size") == size else None


def sidecar_of(path: Path) -> Path:
    """part-00000.arrow -> part-00000.json"""
    return path.with_suffix(".json")


def sweep(folder: Path) -> None:
    """Delete what writers that were killed left behind."""
    for orphan in folder.rglob(f"*{TMP}*"):
        orphan.unlink()


def open_shard(path: Path) -> pa.RecordBatch:
    """Map a shard. Raises ValueError if it isn't one whole record batch."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            batches = list(stream)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable shard ({error}); make the corpus again") from error
    if len(batches) != 1:
        raise ValueError(
            f"{path}: holds {len(batches)} record batches, a shard has 1; it was cut short, or is foreign"
        )
    return batches[0]


def flat_ids(batch: pa.RecordBatch) -> NDArray[Any]:
    """All ids of a shard, uint16 or uint32 [tokens], straight from the map."""
    return batch.column("input_ids").values.to_numpy(zero_copy_only=True)


def _replace(path: Path, content: memoryview) -> None:
    staging = path.with_name(f".{path.name}{TMP}{uuid.uuid4().hex}")
    with staging.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk before the sidecar does
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
