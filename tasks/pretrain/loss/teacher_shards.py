"""Shards with the dense parent's most likely next tokens.

    .scratch/teacher-<fingerprint>/
      part-<digest of its windows>.arrow     Arrow IPC stream of one record batch, a row a window
      part-<digest of its windows>.json      sidecar, the commit record: size, xxh3-128, (domain, window) of each row

| column | type                            |                                                                      |
|--------|---------------------------------|----------------------------------------------------------------------|
| ids    | fixed_size_list<uint16|uint32>  | L x N, the N most likely next tokens of each, most likely first      |
| logs   | fixed_size_list<halffloat>      | L x N, logs of their probabilities at the temperature                |
| rest   | fixed_size_list<float>          | L, log of the probability of all others; -inf where that is 0        |

Shapes: L tokens of a window, N logits kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from tasks import scratch
from tasks.corpus import files, shards
from tasks.corpus.sampling.sampler import Slot

FORMAT = "moeforge-teacher-1"
_COLUMNS = ("ids", "logs", "rest")

Row = tuple[NDArray[Any], NDArray[np.float16], NDArray[np.float32]]


class TeacherShards:
    """The shards of one folder. Runs that draw other windows of the same kind share it and add to it."""

    def __init__(self, folder: Path, key: str) -> None:
        """`key`: the fingerprint of all that decides a row."""
        self.folder, self._key = folder, key
        self._open: dict[str, pa.RecordBatch] = {}

    def paths(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.arrow"))

    def index(self) -> dict[Slot, tuple[str, int]]:
        """Shard and row of every window that is kept."""
        index: dict[Slot, tuple[str, int]] = {}
        for path in self.paths():
            if sidecar := self._sidecar(path):
                for row, (domain, window) in enumerate(sidecar["windows"]):
                    index[domain, window] = (path.name, row)
        return index

    def delete_damaged(self, paths: Iterable[Path]) -> list[str]:
        """Read these shards and delete the damaged ones. Returns what was wrong, a line each."""
        damaged = []
        for path in paths:
            if not shards.sidecar_of(path).exists():  # being written
                continue
            sidecar = self._sidecar(path)
            if sidecar is None:
                damaged.append(f"{path}: its sidecar is not that of this file")
            elif _digest(path) != sidecar["xxh3_128"]:
                damaged.append(f"{path}: its content has changed since it was written")
            else:
                continue
            path.unlink(missing_ok=True)  # another run may do the same
            shards.sidecar_of(path).unlink(missing_ok=True)
        return damaged

    def write(self, slots: Sequence[Slot], rows: Sequence[Row]) -> None:
        """Write a shard of these windows, and then its sidecar.

        Raises:
            OSError: the disk is full.
        """
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(column).reshape(-1)), column[0].size)
            for column in zip(*rows, strict=True)
        ]
        batch = pa.RecordBatch.from_arrays(columns, names=list(_COLUMNS))
        path = self.folder / _name(slots)
        with files.replacing(path) as file:
            sink = shards.write_batch(file, batch.replace_schema_metadata({"format": FORMAT, "task_key": self._key}))
        sidecar = {
            "size": sink.size,
            "xxh3_128": sink.xxh3_128.hexdigest(),
            "task_key": self._key,
            "windows": [list(slot) for slot in slots],
        }
        shards.write_sidecar(path, sidecar)

    def row(self, name: str, row: int, *, seq_len: int) -> Row:
        """One window's row of a shard, straight from the map."""
        if name not in self._open:
            self._open[name] = shards.open_shard(self.folder / name)
        ids, logs, rest = (_values(self._open[name].column(column), row) for column in _COLUMNS)
        return ids.reshape(seq_len, -1), logs.reshape(seq_len, -1), rest

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Delete what killed writers left, unless another run fills the folder now; two may, and write the same."""
        with (self.folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                files.sweep(self.folder)
                for path in self.paths():
                    if not shards.sidecar_of(path).exists():
                        path.unlink()
            except BlockingIOError:
                pass  # the files may be that run's
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def _sidecar(self, path: Path) -> dict[str, Any] | None:
        """The sidecar of a shard; None if it is missing, or not that of this file."""
        try:
            sidecar: dict[str, Any] = json.loads(shards.sidecar_of(path).read_bytes())
            fits = sidecar["size"] == path.stat().st_size and sidecar["task_key"] == self._key
            return sidecar if fits and path.name == _name(sidecar["windows"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _name(slots: Sequence[Sequence[Any]]) -> str:
    """The name of the shard of these windows, in this order."""
    return f"part-{scratch.fingerprint(list(slots))}.arrow"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return str(hashlib.file_digest(file, xxhash.xxh3_128).hexdigest())


def _values(column: pa.FixedSizeListArray, row: int) -> NDArray[Any]:
    values: NDArray[Any] = column.values.to_numpy(zero_copy_only=True)
    size = column.type.list_size
    return values[row * size : (row + 1) * size]
