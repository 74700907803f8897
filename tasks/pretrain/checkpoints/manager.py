"""Checkpoints that are whole or invisible, written while training goes on, and exact resume.

Each rank writes its files in a thread (engine/checkpoint_writer.py). That of rank 0 then waits for a marker file of
every rank and makes the whole visible (store.py); no collective runs beside training. At another world size a
checkpoint is converted first (engine/universal.py).
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import scratch
from tasks.pretrain import schedule
from tasks.pretrain.checkpoints import random_state, store
from tasks.pretrain.checkpoints.store import find, steps, tag
from tasks.pretrain.engine import distributed
from tasks.pretrain.job import TrainingError
from tasks.pretrain.log.log_file import LOG
from tasks.settings import Pretrain

if TYPE_CHECKING:
    from tasks.pretrain.engine.checkpoint_writer import Write
    from tasks.pretrain.engine.interface import Engine

_POLL = 0.02  # seconds between looks for other ranks' markers


class CheckpointManager:
    """A run's checkpoints, seen from one rank. All ranks must make the same calls in order; `check` alone is free."""

    def __init__(self, folder: Path, *, params: Pretrain, rank: int, world_size: int) -> None:
        """Args: folder: checkpoints/, on a disk that all ranks share."""
        self.folder, self.params, self.rank, self.world_size = folder, params, rank, world_size
        self.notes: list[str] = []
        """What the user should read about the checkpoints found, such as a damaged one passed over."""
        self._blocked = 0.0
        self._write: Write | None = None
        self._step = 0
        self._stop = threading.Event()
        self._engine: Engine | None = None

    @property
    def blocked(self) -> float:
        """Seconds that training stood still for checkpoints, so far."""
        return self._blocked + (self._engine.waited if self._engine else 0.0)

    def latest(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint, with its `tag`; deletes what a crash left, and damaged newer ones.

        Every byte is held against what was written; the ranks share that work and agree.

        Raises:
            TrainingError: there are checkpoints, and all are damaged.
        """
        self.finish()
        present: list[int] = []
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            present = steps(self.folder)
        present = self._gathered(present)[0]
        newest, self.notes = store.newest(self.folder, present, damage=self._damage)
        if self.rank == 0:
            store.sweep(self.folder, newest)
        agreed: dict[str, Any] | None = self._gathered(newest)[0]
        return agreed

    def _damage(self, path: Path) -> str | None:
        """What any rank finds wrong with a checkpoint, the same on every rank."""
        log = self.folder.parent / "training" / LOG
        mine = store.damage(path, log=log, rank=self.rank, world_size=self.world_size)
        return next(filter(None, self._gathered(mine)), None)

    def save(self, engine: Engine, *, state: dict[str, Any]) -> None:
        """Begin the checkpoint of `state["step"]`; returns when training may go on, before it is on the disk.

        Waits for the checkpoint before it, if that is still on its way.

        Args:
            state: the loop's, JSON-able, the same on every rank.

        Raises:
            TrainingError: that one, or the beginning of this one, could not be written; the last whole one is kept.
        """
        self.finish()
        start = time.perf_counter()
        self._engine, self._step = engine, state["step"]
        staging = self.folder / f".tmp-{tag(self._step)}"
        state = {**state, **self._form(engine), "params": self.params.model_dump(mode="json")}
        stop = self._stop = threading.Event()

        def then(written: dict[str, dict[str, Any]]) -> None:
            scratch.write_json(_marker(staging, self.rank), written)
            if self.rank == 0 and self._all_written(staging, stop):
                self._commit(staging, state)

        texts = {staging / f"rng-{self.rank}.json": json.dumps(random_state.save())}
        try:
            self._write = engine.save(staging, texts=texts, then=then)
        except OSError as error:
            raise self._failure(error) from error
        self._blocked += time.perf_counter() - start

    def check(self) -> None:
        """Raise TrainingError if this rank's part of the checkpoint on its way could not be written; never waits."""
        if self._write is not None and self._write.error is not None:
            raise self._failure(self._write.error)

    def restore(self, engine: Engine, state: dict[str, Any]) -> None:
        """Load what `latest` returned: weights, optimizer, random states.

        At the world size that wrote it, bit for bit. At another the weights and the optimizer are, and the random
        states start anew from (seed, step, rank).

        Raises:
            TrainingError: it cannot be loaded here, and why.
        """
        self.finish()
        form = self._form(engine)
        if state["dtype"] != form["dtype"]:
            raise TrainingError(
                f"the checkpoint of step {state['step']} was written in {state['dtype']}, and pretrain.precision = "
                f"{self.params.precision} is {form['dtype']} on this machine; set precision: {state['dtype']}"
            )
        other = any(state[name] != value for name, value in form.items())
        engine.load(self.folder / state["tag"], convert=self.params.zero_stage > 0 and other)
        if state["world_size"] == self.world_size:
            random_state.restore(json.loads((self.folder / state["tag"] / f"rng-{self.rank}.json").read_text()))
        else:
            random_state.reseed(self.params.seed, step=state["step"], rank=self.rank)

    def _form(self, engine: Engine) -> dict[str, Any]:
        """What DeepSpeed's files can be read back by; others read them converted.

        Its optimizer for ZeRO-1 in bfloat16 is another one with gradient accumulation than without.
        """
        dtype = str(engine.dtype).removeprefix("torch.")
        return {"world_size": self.world_size, "optimizer": engine.optimizer_name, "dtype": dtype}

    def finish(self) -> None:
        """Wait until the checkpoint on its way is on the disk. Every rank raises TrainingError if any failed."""
        if self._write is None:
            return
        start = time.perf_counter()
        # rank 0's thread waits for the others' markers, so theirs end first, and none writes after the second word
        (self._write.written if self.rank == 0 else self._write.done).wait()
        error = self._shared(self._write.error)
        if self.rank == 0:
            if error is not None:
                self._stop.set()
            self._write.done.wait()
        error = self._shared(error or self._write.error)
        if error is not None:
            raise self._failure(error)
        self._write = None
        self._blocked += time.perf_counter() - start

    def _shared(self, error: Exception | None) -> Exception | None:
        """An error of any rank."""
        texts = self._gathered(None if error is None else repr(error))
        return next((error or OSError(f"rank {rank}: {text}") for rank, text in enumerate(texts) if text), None)

    def _gathered(self, value: Any) -> list[Any]:
        """The value of every rank, by rank."""
        return distributed.gather(value, world_size=self.world_size)

    def _failure(self, error: Exception) -> Exception:
        """What to raise; nothing half is left."""
        self._stop.set()
        if self.rank == 0:
            if self._write is not None:
                self._write.done.wait()
            shutil.rmtree(self.folder / f".tmp-{tag(self._step)}", ignore_errors=True)
        self._write = None
        if not isinstance(error, OSError | RuntimeError | MemoryError):  # torch's writer: a full disk as RuntimeError
            return error
        last = find(self.folder)
        whole = f"the checkpoint of step {last['step']} is whole" if last else "no checkpoint was written before"
        free = shutil.disk_usage(self.folder).free
        failure = TrainingError(
            f"the checkpoint of step {self._step} could not be written to {self.folder} ({error}; {free / 1e9:.1f} GB "
            f"free); {whole}. Make room and run again: training goes on from it"
        )
        failure.__cause__ = error
        return failure

    def _all_written(self, staging: Path, stop: threading.Event) -> bool:
        """Wait for the other ranks' markers; False if the run gave up meanwhile."""
        waiting = set(range(self.world_size))
        while waiting := {rank for rank in waiting if not _marker(staging, rank).exists()}:
            if stop.wait(_POLL):
                return False
        return True

    def _commit(self, staging: Path, state: dict[str, Any]) -> None:
        written: dict[str, dict[str, Any]] = {}
        for rank in range(self.world_size):
            written |= json.loads(_marker(staging, rank).read_text())
            _marker(staging, rank).unlink()
        scratch.write_sealed(staging / store.STATE, {**state, "files": written})
        scratch.fsync(staging)
        final = self.folder / tag(state["step"])
        if final.exists():
            store.delete(final)
        staging.rename(final)
        store.point(self.folder, state["step"])
        for old in steps(self.folder)[: -self.params.keep]:
            milestone = self.params.keep_every is not None and old % self.params.keep_every == 0
            if not milestone and old != schedule.stable(self.params):
                store.delete(self.folder / tag(old))


def _marker(staging: Path, rank: int) -> Path:
    return staging / f"written-{rank}.json"
