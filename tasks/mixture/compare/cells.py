"""One training of the comparison: a cell, committed by a rename, in a process that is a fork of a warm one."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks import scratch
from tasks.mixture.compare.ground import Ground
from tasks.pretrain.launch import environment
from tasks.settings.pretrain import MOVES, Dynamic

_PRELOAD = ["deepspeed.runtime.engine", "transformers.models.llama.modeling_llama"]
"""What a warm process has loaded before it forks for a cell: libraries alone, as a test's warm processes have."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A training by one set of weights, on so many tokens, with one seed."""

    method: str
    seed: int
    tokens: int
    mixture: Path
    """mixture.json, in the ground's folder."""
    references: dict[str, float] | Literal["parent"] | None = None
    """Dynamic batch loading: the losses to reach, or `parent`."""
    eval_tokens: int | None = None
    """Between two evaluations; None: at the end alone."""

    def key(self, ground: Ground) -> str:
        """16 hex digits of all that the result depends on but the code: equal weights are trained once."""
        weights = json.loads((ground.folder / self.mixture).read_text())["weights"]
        return scratch.fingerprint(
            {
                "ground": ground.identity,
                "weights": weights,
                "params": self.params(ground).model_dump(),
                "model": str(ground.model(self.seed)),
            }
        )

    def params(self, ground: Ground) -> Any:
        """The settings of its training."""
        dynamic = Dynamic(references=self.references) if self.references else None
        update = {"tokens": self.tokens, "seed": self.seed, "dynamic": dynamic}
        steps = -(-self.tokens // ground.params.step_tokens)
        update["warmup_tokens"] = min(ground.params.warmup_tokens, (steps - 1) * ground.params.step_tokens)
        return ground.params.model_copy(update=update | {"eval_tokens": self.eval_tokens or self.tokens})


def dynamic(seed: int, tokens: int, *, mixture: Path, references: dict[str, float] | Literal["parent"]) -> Cell:
    """A cell of dynamic batch loading."""
    every = -(-tokens // MOVES)
    return Cell(method="dynamic", seed=seed, tokens=tokens, mixture=mixture, references=references, eval_tokens=every)


def run(ground: Ground, cells: Sequence[Cell], *, jobs: int) -> list[dict[str, Any]]:
    """Train what is not there yet, `jobs` at a time, and return every cell's result, in their order.

    Raises:
        ValueError: trainings failed; the message has each one's, and the others are kept.
    """
    asked = [ground.folder / "cells" / f"{cell.key(ground)}.json" for cell in cells]
    missing = {path: cell for cell, path in zip(cells, asked, strict=True) if not path.exists()}
    faults = []
    if missing:
        os.environ.setdefault("OMP_NUM_THREADS", str(environment.threads({"LOCAL_SIZE": str(jobs)})))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
            futures = {pool.submit(_train, ground, cell, path): cell for path, cell in missing.items()}
            for done in as_completed(futures):
                cell = futures[done]
                if error := done.exception():
                    faults.append(f"{cell.method}, seed {cell.seed}, {cell.tokens:,} tokens: {error}")
                    continue
                print(f"trained: {cell.method}, seed {cell.seed}, {cell.tokens:,} tokens", flush=True)
    if faults:
        raise ValueError("; ".join(sorted(faults)) + f"; their output is in {ground.folder / 'log'}")
    return [json.loads(path.read_text()) for path in asked]


def _train(ground: Ground, cell: Cell, target: Path) -> None:
    """Train a cell and judge it, in this process; a killed one goes on from its last checkpoint."""
    threading.Thread(target=_end_with_command, daemon=True).start()
    os.chdir(ground.folder)
    log = Path("log") / f"{target.stem}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    from tasks.pretrain.job import Job, code_version
    from tasks.pretrain.launch import worker

    workspace = scratch.ROOT / "cells" / target.stem
    params = cell.params(ground)
    job = Job(
        pipeline=f"{cell.method}-{cell.seed}",
        params=params,
        corpus=ground.corpus,
        model=ground.model(cell.seed),
        parent=ground.parent,
        mixture=cell.mixture,
        workspace=workspace,
    )
    job.write()
    environment.complete(os.environ, launcher=params.launcher, processes=params.processes)
    worker.run(job)
    trained = json.loads((workspace / "pretrain.json").read_text())
    result = {
        "method": cell.method,
        "seed": cell.seed,
        "tokens": trained["tokens"],
        "weights": json.loads(cell.mixture.read_text())["weights"],
        "final_weights": trained["final_weights"],
        "validation": trained["validation_after"],
        **judge(workspace / "trained", ground),
        "cpu_seconds": round(time.process_time(), 1),
        "code": code_version(),
    }
    scratch.write_json(target, result)
    shutil.rmtree(workspace)


def _end_with_command() -> None:
    """End this process when the command that asked for it is gone: the server that forked it lives as long as it."""
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os._exit(1)


def judge(model: Path, ground: Ground) -> dict[str, dict[str, float]]:
    """Losses of a checkpoint on the test text, nats per predicted token: {heldout: {domain}, unseen: {domain}}."""
    from tasks.corpus.sampling import windows
    from tasks.moe import checkpoint
    from tasks.moe.loss import window_nll

    loaded, seq_len = checkpoint.load(model), ground.params.seq_len
    every = {
        "heldout": windows.test(ground.corpus, seq_len=seq_len, count=ground.windows),
        "unseen": windows.unseen(ground.corpus, seq_len=seq_len, count=ground.windows),
    }
    return {
        what: {
            domain: float(window_nll(loaded, ids, batch=ground.params.micro_batch).mean()) / (seq_len - 1)
            for domain, ids in domains.items()
        }
        for what, domains in every.items()
    }
