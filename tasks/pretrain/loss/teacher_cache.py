"""Keeps the dense parent's most likely next tokens, so that the parent need not be in memory during training.

Shapes: L tokens of a window, T = B * L, N logits kept, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import scratch
from tasks.corpus import manifest
from tasks.corpus.sampling.loader import Batch, Gather
from tasks.corpus.sampling.sampler import Slot
from tasks.corpus.sampling.windows import Windows
from tasks.display import Progress
from tasks.moe import allocator
from tasks.pretrain import batches
from tasks.pretrain.engine import distributed
from tasks.pretrain.job import Job, TrainingError
from tasks.pretrain.loss.teacher import Teacher
from tasks.pretrain.loss.teacher_shards import FORMAT, Row, TeacherShards

if TYPE_CHECKING:
    import torch

    from tasks.pretrain.loss.divergence import Kept

_SHARD = 1 << 16  # tokens: what a kill costs, and 17 MB at 64 logits
_CHUNK = 256  # tokens whose logits exist at once in fp32


class TeacherCache:
    """The parent's distributions for the windows of a run."""

    def __init__(self, job: Job, *, device: torch.device, dtype: torch.dtype) -> None:
        """Open the cache, and compute the windows of the run that it lacks or has damaged.

        All ranks must do it together.

        Raises:
            TrainingError: the parent has fewer than `top_n` tokens, or the disk is full.
        """
        assert job.params.distill is not None
        assert job.params.distill.top_n is not None
        self._job, self._device, self._dtype = job, device, dtype
        self._top_n, self._temperature = job.params.distill.top_n, job.params.distill.temperature
        vocabulary = json.loads((job.parent / "config.json").read_text())["vocab_size"]
        if self._top_n > vocabulary:
            raise TrainingError(
                f"pretrain.distill.top_n = {self._top_n} is more than the {vocabulary} tokens of {job.parent}; "
                "lower it"
            )
        self._ids = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        self._rank, self._world_size = _rank_and_world_size()
        self._corpus = manifest.load(job.corpus)
        key = self._fingerprint()
        self._shards = TeacherShards(scratch.ROOT / f"teacher-{key}", key)
        self.folder = self._shards.folder
        self._teacher: Teacher | None = None
        self._windows: dict[str, Windows] = {}
        self._fill()
        self._teacher = None
        allocator.release()
        self._index = self._shards.index()

    def kept(self, batch: Batch, *, rows: slice) -> Kept:
        """The parent's distributions at the tokens of the windows `rows` of a batch.

        The parent computes a window that the run was not expected to draw, such as after a rollback, now.
        """
        import torch

        from tasks.pretrain.loss.divergence import Kept

        kept = [self._row(slot) for slot in zip(batch.domains[rows], batch.windows[rows], strict=True)]
        ids, logs, rest = (np.concatenate(column) for column in zip(*kept, strict=True))
        return Kept(
            torch.from_numpy(ids.astype(np.int64)).to(self._device),
            torch.from_numpy(logs.astype(np.float32)).to(self._device),
            torch.from_numpy(rest).to(self._device),
        )

    def _fingerprint(self) -> str:
        """Of all that decides a row."""
        params = self._job.params
        decides = {
            "format": FORMAT,
            "parent": self._gather(scratch.digest(self._job.parent) if self._rank == 0 else "")[0],
            "corpus": self._corpus.sha256,
            "seq_len": params.seq_len,
            "packing": params.packing,
            "mask_documents": params.mask_documents,
            "top_n": self._top_n,
            "temperature": self._temperature,
            "dtype": str(self._dtype),
        }
        return scratch.fingerprint(decides)

    def _windows_of_run(self) -> list[Slot]:
        """The distinct windows of the run, in the order in which it will first draw them."""
        weights = json.loads(self._job.mixture.read_text())["weights"]
        sampler, _ = batches.draw(self._job, weights, corpus_sha256=self._corpus.sha256, rank=0, world_size=1)
        return list(dict.fromkeys(slot for _ in range(self._job.params.steps) for slot in sampler.next()))

    def _fill(self) -> None:
        """Compute what is missing; each rank computes its share."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._shards.filling() if self._rank == 0 else contextlib.nullcontext():
            self._wait(None)  # until rank 0 has swept
            paths = self._gather(self._shards.paths())[0]  # one list for all ranks, because some delete from it
            damaged = self._gather(self._shards.delete_damaged(paths[self._rank :: self._world_size]))
            for problem in itertools.chain(*damaged) if self._rank == 0 else ():
                print(f"teacher: {problem}; deleted, to be made again", flush=True)
            kept = self._shards.index()
            missing = [slot for slot in self._windows_of_run() if slot not in kept]
            self._wait(None)  # no rank writes before all have looked
            failure = None
            try:
                self._compute(missing)
            except OSError as error:
                failure = (
                    f"{self.folder}: the parent's logits could not be written ({error}); "
                    f"{shutil.disk_usage(self.folder).free / 1e9:.1f} GB are free. Make room and run again: what is "
                    f"there is kept. Or lower pretrain.distill.top_n = {self._top_n}"
                )
            self._wait(failure)

    def _compute(self, missing: list[Slot]) -> None:
        """Compute and write this rank's share of the missing windows."""
        if not missing:
            return
        seq_len = self._job.params.seq_len
        size = len(missing) * seq_len * (self._top_n * (2 + self._ids.itemsize) + 4)
        if size > shutil.disk_usage(self.folder).free:
            raise OSError(f"{size / 1e9:.1f} GB are needed for {len(missing)} windows of {seq_len} tokens")
        mine = missing[self._rank :: self._world_size]
        per_shard = max(1, _SHARD // seq_len)
        with contextlib.ExitStack() as stack:
            progress = None
            if self._rank == 0:
                print(
                    f"teacher: keeping {self._top_n} logits a token of {len(missing)} windows in {self.folder} "
                    f"({size / 1e9:.2f} GB)",
                    flush=True,
                )
                progress = stack.enter_context(Progress(len(mine), label="teacher", unit="window", stream=sys.stdout))
            for start in range(0, len(mine), per_shard):
                slots, rows = mine[start : start + per_shard], []
                for slot in slots:
                    rows.append(self._compute_row(slot))
                    if progress:
                        progress.advance()
                self._shards.write(slots, rows)

    def _wait(self, failure: str | None) -> None:
        """Wait for all ranks; raise on each if one of them failed."""
        if message := next(filter(None, self._gather(failure)), None):
            raise TrainingError(message)

    def _gather(self, value: Any) -> list[Any]:
        return distributed.gather(value, world_size=self._world_size)

    def _compute_row(self, slot: Slot) -> Row:
        """Run the parent on one window. Always one, so that a row does not depend on others in its batch."""
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
        chunks: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, params.seq_len, _CHUNK):
            logits_CV = self._teacher.logits(states_LD[start : start + _CHUNK]).float() / self._temperature
            logs_CV = torch.log_softmax(logits_CV, 1)
            logs_CN, ids_CN = logs_CV.topk(self._top_n, dim=1)
            rest_C = logs_CV.exp_().scatter_(1, ids_CN, 0.0).sum(1).log()
            chunks.append((ids_CN.cpu(), logs_CN.cpu(), rest_C.cpu()))
        ids, logs, rest = (torch.cat(column).numpy() for column in zip(*chunks, strict=True))
        return ids.astype(self._ids), logs.astype(np.float16), rest

    def _row(self, slot: Slot) -> Row:
        if slot in self._index:
            name, row = self._index[slot]
            return self._shards.row(name, row, seq_len=self._job.params.seq_len)
        if self._teacher is None:
            print(f"teacher: {slot[0]} window {slot[1]} was not expected; loading {self._job.parent}", flush=True)
        return self._compute_row(slot)


def _rank_and_world_size() -> tuple[int, int]:
    import torch

    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
