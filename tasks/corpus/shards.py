"""Shards: Arrow IPC streams of one record batch, written whole or not at all, each with a sidecar that commits it.

| column    | type                      |                                                                     |
|-----------|---------------------------|---------------------------------------------------------------------|
| input_ids | large_list<uint16|uint32> | separators included; uint16 if the vocabulary fits                  |
| doc_id    | fixed_size_binary(16)     | xxh3-128 of the normalised text                                     |
| source    | dictionary<int32, string> | file the document came from                                         |
| row       | uint64                    | its line, row or page there                                         |
| loss_mask | large_list<bool>          | only if a reader gives masks: which tokens are targets              |

The stream format is what `datasets.Dataset.from_file` opens. Not compressed, so that readers map it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from tasks.corpus import files

FORMAT = "moeforge-shard-1"
FIRST_IDS = 32
METADATA = ("domain", "split", "tokenizer", "eos_token_id", "task_key")
"""What the schema of a shard names, beside others."""


class Part:
    """Tokenised documents on their way into one shard, in the order they were read; ids are referenced, not copied."""

    def __init__(self) -> None:
        self.text_bytes = self.tokens = 0
        self._ids: list[NDArray[Any]] = []
        self._masks: list[NDArray[np.bool_] | None] = []
        self._offsets: list[NDArray[np.int64]] = []
        self._doc_ids: list[NDArray[np.uint8]] = []
        self._rows: list[NDArray[np.uint64]] = []
        self._names: dict[str, int] = {}
        self._sources: list[int] = []

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._sources)

    def append(
        self,
        ids: NDArray[Any],
        offsets: NDArray[np.int64],
        *,
        doc_ids: NDArray[np.uint8],
        sources: Sequence[str],
        rows: NDArray[np.uint64],
        text_bytes: int,
        loss_mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """Add n documents.

        Args:
            ids: uint16 or uint32, flat, of the shard's own dtype; document i is `ids[offsets[i]:offsets[i + 1]]`.
            offsets: [n + 1], not falling; they need not begin at 0, so a slice of a batch's offsets is enough.
            doc_ids: [n, 16].
            sources: the file of each document.
            rows: [n], where each stands in its file.
            text_bytes: UTF-8 bytes of all n texts together.
            loss_mask: as `ids`, False at tokens that are no targets; None if all are.

        Raises:
            ValueError: the lengths don't agree.
        """
        n = len(offsets) - 1
        if not n == len(doc_ids) == len(sources) == len(rows):
            raise ValueError(f"{n} documents, {len(doc_ids)} doc_ids, {len(sources)} sources and {len(rows)} rows")
        self._ids.append(ids)
        self._masks.append(loss_mask)
        self._offsets.append(offsets)
        self._doc_ids.append(doc_ids)
        self._rows.append(rows)
        self._sources += [self._names.setdefault(name, len(self._names)) for name in sources]
        self.tokens += int(offsets[-1] - offsets[0])
        self.text_bytes += int(text_bytes)

    def batch(
        self, order: NDArray[np.int64], *, dtype: type[np.unsignedinteger], metadata: dict[str, str]
    ) -> pa.RecordBatch:
        """The documents as the record batch of a shard, document `order[i]` (int64 [documents]) in place i.

        Memory: the ids once more. `metadata` goes into the schema; its `task_key` names everything that the shard's
        bytes depend on.

        Raises:
            TypeError: ids of another type than `dtype`.
        """
        if other := {ids.dtype for ids in self._ids} - {np.dtype(dtype)}:
            raise TypeError(f"ids are {other.pop()}, not {np.dtype(dtype)}")
        starts = np.concatenate([offsets[:-1] for offsets in self._offsets])
        lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])[order]
        ends = np.concatenate([[0], lengths.cumsum()])
        home = np.repeat(np.arange(len(self._ids)), [len(offsets) - 1 for offsets in self._offsets])
        flat = np.empty(self.tokens, dtype=dtype)
        flat_mask = None if all(mask is None for mask in self._masks) else np.ones(self.tokens, dtype=bool)
        pieces = zip(home[order].tolist(), starts[order].tolist(), ends[:-1].tolist(), lengths.tolist(), strict=True)
        for chunk, start, place, length in pieces:
            flat[place : place + length] = self._ids[chunk][start : start + length]
            if flat_mask is not None and (mask := self._masks[chunk]) is not None:
                flat_mask[place : place + length] = mask[start : start + length]
        names = pa.array(list(self._names), pa.string()).take(pa.array(np.array(self._sources, dtype=np.int64)[order]))
        arrays = {
            "input_ids": pa.LargeListArray.from_arrays(pa.array(ends), pa.array(flat)),
            "doc_id": to_binary(np.concatenate(self._doc_ids)[order]),
            "source": names.dictionary_encode(),
            "row": pa.array(np.concatenate(self._rows)[order], pa.uint64()),
        }
        if flat_mask is not None:
            arrays["loss_mask"] = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(flat_mask))
        facts = {**metadata, "documents": str(self.documents), "tokens": str(self.tokens)}
        return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays)).replace_schema_metadata(facts)


class Hashed:
    """A file that knows the size and the digests of what was written to it."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0
        self.sha256, self.xxh3_128 = hashlib.sha256(), xxhash.xxh3_128()

    def write(self, content: Any) -> int:
        """Write bytes or a buffer."""
        view = memoryview(content)
        self.sha256.update(view)
        self.xxh3_128.update(view)
        self.size += view.nbytes
        return self._file.write(view)


def write_batch(file: IO[bytes], batch: pa.RecordBatch) -> Hashed:
    """Write the bytes of a shard, without a copy of them."""
    sink = Hashed(file)
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), batch.schema) as writer:
        writer.write_batch(batch)
    return sink


def write(
    path: Path, part: Part, *, order: NDArray[np.int64], dtype: type[np.unsignedinteger], metadata: dict[str, str]
) -> dict[str, Any]:
    """Write a shard and then its sidecar; return the sidecar. A reader finds the old files, the new ones, or none.

    Arguments as of `Part.batch`.
    """
    batch = part.batch(order, dtype=dtype, metadata=metadata)
    with files.replacing(path) as file:
        sink = write_batch(file, batch)
    ids, doc_ids = flat_ids(batch), batch.column("doc_id")
    sidecar = {
        "path": str(Path(*path.parts[-3:])),
        "size": sink.size,
        "documents": batch.num_rows,
        "tokens": len(ids),
        "text_bytes": part.text_bytes,
        "min_id": int(ids.min()),
        "max_id": int(ids.max()),
        "first_ids": ids[:FIRST_IDS].tolist(),
        "first_doc_id": doc_ids[0].as_py().hex(),
        "last_doc_id": doc_ids[-1].as_py().hex(),
        "sha256": sink.sha256.hexdigest(),
        "xxh3_128": sink.xxh3_128.hexdigest(),
        "task_key": metadata["task_key"],
    }
    write_sidecar(path, sidecar)
    return sidecar


def write_sidecar(path: Path, sidecar: dict[str, Any]) -> None:
    """Commit the shard at `path`."""
    with files.replacing(sidecar_of(path)) as file:
        file.write(sidecar_bytes(sidecar))


def sidecar_bytes(sidecar: dict[str, Any]) -> bytes:
    """What stands in a sidecar."""
    return (json.dumps(sidecar, indent=2, sort_keys=True) + "\n").encode()


def committed(path: Path, task_key: str) -> dict[str, Any] | None:
    """The sidecar of a shard that was finished for this very task; None if there is work to do."""
    try:
        sidecar = json.loads(sidecar_of(path).read_text())
        size = path.stat().st_size
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return sidecar if sidecar.get("task_key") == task_key and sidecar.get("size") == size else None


def sidecar_of(path: Path) -> Path:
    """part-00000-000.arrow -> part-00000-000.json"""
    return path.with_suffix(".json")


def open_shard(path: Path) -> pa.RecordBatch:
    """Map a shard.

    Raises:
        ValueError: it isn't one whole record batch.
        OSError: this machine could not map it now, for want of memory, say; nothing is known to be wrong with it.
    """
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            batches = list(stream)
    except (pa.ArrowInvalid, OSError, MemoryError) as error:
        files.raise_machine_error(error, path)
        raise ValueError(f"{path}: not a readable shard ({error}); make the corpus again") from error
    if len(batches) != 1:
        raise ValueError(
            f"{path}: holds {len(batches)} record batches, a shard has 1; it was cut short, or is foreign"
        )
    return batches[0]


def flat_ids(batch: pa.RecordBatch) -> NDArray[Any]:
    """All ids of a shard, uint16 or uint32 [tokens], straight from the map."""
    values: NDArray[Any] = batch.column("input_ids").values.to_numpy(zero_copy_only=True)
    return values


def offsets(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """Where each document begins in the flat ids, and where the last ends: int64 [documents + 1], from the map."""
    offsets: NDArray[np.int64] = batch.column("input_ids").offsets.to_numpy(zero_copy_only=True)
    return offsets


def loss_mask(batch: pa.RecordBatch) -> pa.BooleanArray | None:
    """Which of all ids of a shard are targets of training, [tokens] from the map; None if all are."""
    return batch.column("loss_mask").values if "loss_mask" in batch.schema.names else None


def doc_ids(batch: pa.RecordBatch) -> NDArray[np.uint8]:
    """Ids of all documents of a shard, [documents, 16], straight from the map."""
    return from_binary(batch.column("doc_id"))


def from_binary(column: pa.FixedSizeBinaryArray) -> NDArray[np.uint8]:
    """The values of a column, [rows, width], not copied."""
    width = column.type.byte_width
    content = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    return content[width * column.offset :][: width * len(column)].reshape(-1, width)


def to_binary(values: NDArray[Any]) -> pa.FixedSizeBinaryArray:
    """A column of the bytes of each row of an array [rows, n]."""
    content = np.ascontiguousarray(values).view(np.uint8)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(content.shape[1]), len(content), [None, pa.py_buffer(content)]
    )


def require_shard(batch: pa.RecordBatch, path: Path) -> None:
    """Raise ValueError if a batch lacks the columns or the metadata of a shard, or holds no document."""
    if missing := {"input_ids", "doc_id", "source", "row"} - set(batch.schema.names):
        raise ValueError(f"{path}: no shard, it lacks the columns {', '.join(sorted(missing))}")
    if missing := set(METADATA) - {key.decode() for key in batch.schema.metadata or {}}:
        raise ValueError(f"{path}: no shard, its schema lacks the metadata {', '.join(sorted(missing))}")
    if batch.num_rows == 0:
        raise ValueError(f"{path}: holds no document")
