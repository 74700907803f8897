"""The dense parent's most likely next tokens, kept in shards, so that the parent needn't be in memory during training.

    .scratch/teacher-<fingerprint>/
      part-<digest of its windows>.arrow     Arrow IPC stream of one record batch, a row a window
      part-<digest of its windows>.json      sidecar, the commit record: size, xxh3-128, (domain, window) of each row

| column | type                            |                                                                      |
|--------|---------------------------------|----------------------------------------------------------------------|
| ids    | fixed_size_list<uint16|uint32>  | L x N, the N most likely next tokens of each, most likely first      |
| logs   | fixed_size_list<halffloat>      | L x N, logs of their probabilities at the temperature                |
| rest   | fixed_size_list<float>          | L, log of the probability of all others; -inf where that is 0        |

The fingerprint is of all that decides a row. Runs that draw other windows share the folder and add to it.

Shapes: L tokens of a window, T = B * L, N logits kept, V vocabulary.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from tasks import scratch
from tasks.corpus import files, manifest, shards
from tasks.corpus.sampling.loader import Batch, Gather
from tasks.corpus.sampling.sampler import Slot
from tasks.corpus.sampling.windows import Windows
from tasks.moe import allocator
from tasks.pretrain import batches
from tasks.pretrain.job import Job, TrainingError
from tasks.pretrain.loss.teacher import Teacher

if TYPE_CHECKING:
    import torch

    from tasks.pretrain.loss.divergence import Kept

FORMAT = "moeforge-teacher-1"
_SHARD = 1 << 16  # tokens: what a kill costs, and 17 MB at 64 logits
_CHUNK = 256  # tokens whose logits exist at once in fp32
_EVERY = 10.0  # seconds between lines of progress

Row = tuple[NDArray[Any], NDArray[np.float16], NDArray[np.float32]]


class Cache:
    """What was kept of the parent's distributions, for the windows of a run."""

    def __init__(self, job: Job, *, device: torch.device, dtype: torch.dtype) -> None:
        """Open the cache, and make what it lacks, or has damaged, of the windows that the run will draw.

        All ranks must do it together.

        Raises:
            TrainingError: the parent has fewer than `top_n` tokens, or the disk is full.
        """
        assert job.params.distill is not None
        assert job.params.distill.top_n is not None
        self._job, self._device, self._dtype = job, device, dtype
        self._n, self._temperature = job.params.distill.top_n, job.params.distill.temperature
        vocabulary = json.loads((job.parent / "config.json").read_text())["vocab_size"]
        if self._n > vocabulary:
            raise TrainingError(
                f"pretrain.distill.top_n = {self._n} is more than the {vocabulary} tokens of {job.parent}; lower it"
            )
        self._ids = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        self._rank, self._world_size = _place()
        self._corpus = manifest.load(job.corpus)
        self._key = self._fingerprint()
        self.folder = scratch.ROOT / f"teacher-{self._key}"
        self._teacher: Teacher | None = None
        self._windows: dict[str, Windows] = {}
        self._open: dict[str, pa.RecordBatch] = {}
        self._fill()
        self._teacher = None
        allocator.release()
        self._index = self._find()

    def kept(self, batch: Batch, *, rows: slice) -> Kept:
        """The parent's distributions at the tokens of the windows `rows` of a batch.

        A window that the run wasn't expected to draw (after a rollback) is computed now, by the parent itself.
        """
        import torch

        from tasks.pretrain.loss.divergence import Kept

        found = [self._row(slot) for slot in zip(batch.domains[rows], batch.windows[rows], strict=True)]
        ids, logs, rest = (np.concatenate(column) for column in zip(*found, strict=True))
        return Kept(
            torch.from_numpy(ids.astype(np.int64)).to(self._device),
            torch.from_numpy(logs.astype(np.float32)).to(self._device),
            torch.from_numpy(rest).to(self._device),
        )

    def _fingerprint(self) -> str:
        params = self._job.params
        found = [scratch.digest(self._job.parent) if self._rank == 0 else ""]
        if self._world_size > 1:
            import torch

            torch.distributed.broadcast_object_list(found, src=0)
        decides = {
            "format": FORMAT,
            "parent": found[0],
            "corpus": self._corpus.sha256,
            "seq_len": params.seq_len,
            "packing": params.packing,
            "mask_documents": params.mask_documents,
            "top_n": self._n,
            "temperature": self._temperature,
            "dtype": str(self._dtype),
        }
        return scratch.fingerprint(decides)

    def _drawn(self) -> list[Slot]:
        """The distinct windows of the run, in the order in which it will first draw them."""
        weights = json.loads(self._job.mixture.read_text())["weights"]
        sampler, _ = batches.draw(self._job, weights, corpus_sha256=self._corpus.sha256, rank=0, world_size=1)
        return list(dict.fromkeys(slot for _ in range(self._job.params.steps) for slot in sampler.next()))

    def _find(self) -> dict[Slot, tuple[str, int]]:
        """Shard and row of every window that is kept."""
        index: dict[Slot, tuple[str, int]] = {}
        for path in sorted(self.folder.glob("part-*.arrow")):
            if sidecar := self._sidecar(path):
                for row, (domain, window) in enumerate(sidecar["windows"]):
                    index[domain, window] = (path.name, row)
        return index

    def _sidecar(self, path: Path) -> dict[str, Any] | None:
        """The sidecar of a shard; None if it is not there, or not that of this file."""
        try:
            sidecar: dict[str, Any] = json.loads(shards.sidecar_of(path).read_bytes())
            fits = sidecar["size"] == path.stat().st_size and sidecar["task_key"] == self._key
            return sidecar if fits and path.name == _name(sidecar["windows"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _sift(self) -> None:
        """Delete damaged shards, and say so. Each rank reads its share of them."""
        damaged = []
        paths = self._gathered(sorted(self.folder.glob("part-*.arrow")))[0]  # one list, for some delete from it
        for path in paths[self._rank :: self._world_size]:
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
        for problem in (problem for rank in self._gathered(damaged) for problem in rank):
            if self._rank == 0:
                print(f"teacher: {problem}; deleted, to be made again", flush=True)

    def _fill(self) -> None:
        """Keep what is missing; each rank computes its share."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _filling(self.folder) if self._rank == 0 else contextlib.nullcontext():
            self._together(None)  # the first has swept
            self._sift()
            kept = self._find()
            missing = [slot for slot in self._drawn() if slot not in kept]
            self._together(None)  # no rank writes before all have looked
            try:
                self._compute(missing)
                failed = None
            except OSError as error:
                failed = (
                    f"{self.folder}: the parent's logits could not be written ({error}); "
                    f"{shutil.disk_usage(self.folder).free / 1e9:.1f} GB are free. Make room and run again: what is "
                    f"there is kept. Or lower pretrain.distill.top_n = {self._n}"
                )
            self._together(failed)

    def _compute(self, missing: list[Slot]) -> None:
        if not missing:
            return
        seq_len = self._job.params.seq_len
        size = len(missing) * seq_len * (self._n * (2 + self._ids.itemsize) + 4)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise OSError(f"{size / 1e9:.1f} GB are needed for {len(missing)} windows of {seq_len} tokens")
        mine = missing[self._rank :: self._world_size]
        if self._rank == 0:
            print(
                f"teacher: keeping {self._n} logits a token of {len(missing)} windows in {self.folder} "
                f"({size / 1e9:.2f} GB)",
                flush=True,
            )
        begun = shown = time.monotonic()
        per_shard = max(1, _SHARD // seq_len)
        for start in range(0, len(mine), per_shard):
            some = mine[start : start + per_shard]
            done = []
            for slot in some:
                done.append(self._ask(slot))
                now = time.monotonic()
                if self._rank == 0 and now - shown > _EVERY:
                    shown, count = now, start + len(done)
                    left = (now - begun) / count * (len(mine) - count)
                    print(f"teacher: {count} of {len(mine)} windows, {left / 60:.1f} minutes left", flush=True)
            self._write(some, done)

    def _together(self, failed: str | None) -> None:
        """Wait for all ranks; raise on each if one of them failed."""
        if message := next(filter(None, self._gathered(failed)), None):
            raise TrainingError(message)

    def _gathered(self, value: Any) -> list[Any]:
        """The value of every rank, by rank."""
        if self._world_size == 1:
            return [value]
        import torch

        every: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(every, value)
        return every

    def _ask(self, slot: Slot) -> Row:
        """Let the parent read one window. Always one, so that a row doesn't depend on what it was computed with."""
        import torch

        domain, _ = slot
        params = self._job.params
        if self._teacher is None:
            self._teacher = Teacher.load(self._job, device=self._device, dtype=self._dtype)
        if domain not in self._windows:
            self._windows[domain] = Windows(
                self._job.corpus, domain, "train", seq_len=params.seq_len, packing=params.packing
            )
        gather = Gather(self._windows, seq_len=params.seq_len, mine=range(1), mask=params.mask_documents)
        states_LD = self._teacher.states(gather([slot]), rows=slice(0, 1))[0][0]
        found: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, params.seq_len, _CHUNK):
            logits_CV = self._teacher.logits(states_LD[start : start + _CHUNK]).float() / self._temperature
            logs_CV = torch.log_softmax(logits_CV, 1)
            logs_CN, ids_CN = logs_CV.topk(self._n, dim=1)
            rest_C = logs_CV.exp_().scatter_(1, ids_CN, 0.0).sum(1).log()
            found.append((ids_CN.cpu(), logs_CN.cpu(), rest_C.cpu()))
        ids, logs, rest = (torch.cat(column).numpy() for column in zip(*found, strict=True))
        return ids.astype(self._ids), logs.astype(np.float16), rest

    def _write(self, slots: Sequence[Slot], rows: list[Row]) -> None:
        columns = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(column).reshape(-1)), column[0].size)
            for name, column in zip(("ids", "logs", "rest"), zip(*rows, strict=True), strict=True)
        }
        batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns)).replace_schema_metadata(
            {"format": FORMAT, "task_key": self._key}
        )
        path = self.folder / _name(slots)
        with files.replacing(path) as file:
            sink = shards.write_batch(file, batch)
        sidecar = {
            "size": sink.size,
            "xxh3_128": sink.xxh3_128.hexdigest(),
            "task_key": self._key,
            "windows": [list(slot) for slot in slots],
        }
        shards.write_sidecar(path, sidecar)

    def _row(self, slot: Slot) -> Row:
        if slot not in self._index:
            if self._teacher is None:
                print(
                    f"teacher: {slot[0]} window {slot[1]} wasn't foreseen; loading {self._job.parent}",
                    flush=True,
                )
            return self._ask(slot)
        name, row = self._index[slot]
        if name not in self._open:
            self._open[name] = shards.open_shard(self.folder / name)
        length = self._job.params.seq_len
        ids, logs, rest = (_row_of(self._open[name].column(column), row) for column in ("ids", "logs", "rest"))
        return ids.reshape(length, -1), logs.reshape(length, -1), rest


def _name(slots: Sequence[Sequence[Any]]) -> str:
    """The name of the shard of these windows, in this order."""
    return f"part-{scratch.fingerprint(list(slots))}.arrow"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return str(hashlib.file_digest(file, xxhash.xxh3_128).hexdigest())


def _row_of(column: pa.FixedSizeListArray, row: int) -> NDArray[Any]:
    """One row's values, straight from the map."""
    values: NDArray[Any] = column.values.to_numpy(zero_copy_only=True)
    size = column.type.list_size
    return values[row * size : (row + 1) * size]


def _place() -> tuple[int, int]:
    """Rank and world size."""
    import torch

    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextlib.contextmanager
def _filling(folder: Path) -> Iterator[None]:
    """Delete what killed writers left, unless another run is filling the folder now; two may, and write the same."""
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            files.sweep(folder)
            for path in folder.glob("part-*.arrow"):
                if not shards.sidecar_of(path).exists():
                    path.unlink()
        except BlockingIOError:
            pass  # what lies there may be that run's
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield
