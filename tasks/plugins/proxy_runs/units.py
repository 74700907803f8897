"""One unit: a training of the proxy on one mix, by the loop of the stage `pretrain`, and the losses it ends with."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import scratch
from tasks.control.training import dense
from tasks.mixture.problem import Problem
from tasks.pretrain.job import Job
from tasks.settings import Pretrain, Proxy
from tasks.settings.pretrain import FIXED, Guard

_WARMUP = 10
"""A tenth of the steps."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all trainings of a proxy share."""

    checkpoint: Path
    """What each begins with (models.py)."""
    corpus: Path
    params: Pretrain
    """`eval_windows` of them validation windows of each domain are measured."""
    also: tuple[str, ...] = ()
    """Domains never trained on that are measured too, on their test text."""

    def domains(self) -> dict[str, str]:
        """Digests of the text of every domain that is trained on or measured."""
        from tasks.corpus import manifest

        corpus = manifest.load(self.corpus)
        return {
            name: scratch.fingerprint([shard.sha256 for part in entry.splits.values() for shard in part.shards])
            for name, entry in corpus.domains.items()
            if name in corpus.trained or name in self.also
        }

    def base(self) -> str:
        """Digest of what a unit depends on besides text, mix and seed: checkpoint, settings, code."""
        from tasks.pretrain import job

        content = {
            "checkpoint": scratch.digest(self.checkpoint),
            "params": self.params.model_dump(exclude={"seed"}),  # each unit has its own
            "also": self.also,
            "code": job.code_digest(),
        }
        return scratch.fingerprint(content)

    def flops(self) -> float:
        """Floating-point operations of one training."""
        return self.tokens * flops_per_token(self.checkpoint, seq_len=self.params.seq_len)

    @property
    def tokens(self) -> int:
        """Of one training."""
        return self.params.steps * self.params.step_tokens


def training(proxy: Proxy, pretrain: Pretrain) -> Pretrain:
    """The settings of a proxy's training.

    A student is trained as the pipeline trains it (router, balance, packing, precision), but for the course and the
    size of the run. The others have no experts; a model from scratch has one learning rate. The schedule is a cosine
    to a tenth after a warm-up of a tenth, and one process trains.
    """
    step = proxy.batch * proxy.seq_len
    steps = -(-proxy.tokens // step)
    params = pretrain if proxy.model == "student" else dense(pretrain)
    return params.model_copy(
        update={
            "tokens": steps * step,
            "seq_len": proxy.seq_len,
            "batch": proxy.batch,
            "micro_batch": proxy.micro_batch or proxy.batch,
            "processes": 1,
            "launcher": "local",
            "hostfile": None,
            "expert_parallel": 1,
            "learning_rate": proxy.learning_rate,
            "learning_rates": {} if proxy.model == "scratch" else params.learning_rates,
            "schedule": "cosine",
            "final_lr_share": 0.1,
            "warmup_tokens": steps // _WARMUP * step,
            "train": "all",
            "distill": None,
            **FIXED,
            "eval_tokens": steps * step,
            "eval_windows": proxy.windows,
            "save_every": steps,
            "keep": 1,
            "keep_every": None,
            "guard": Guard(),
            "trackers": (),
            "seed": proxy.seed,
        }
    )


def train(setup: Setup, *, weights: dict[str, float], seed: int, workspace: Path) -> dict[str, float]:
    """Train the proxy on one mix; returns its loss on each domain in nats per predicted token.

    Killed at any point, the same call with the same workspace ends with the same losses.

    Args:
        weights: of every trained domain of the corpus, sum 1.
        seed: of the batches.
        workspace: keeps unfinished work; the caller deletes it.

    Raises:
        Diverged: a loss is not finite.
        TrainingError, ValueError, OSError: it cannot be trained, and why.
    """
    run(job_of(setup, weights=weights, seed=seed, workspace=workspace))
    losses: dict[str, float] = json.loads((workspace / "pretrain.json").read_text())["validation_after"]
    if setup.also:
        losses |= unseen(workspace / "trained", setup)
    return losses


def job_of(
    setup: Setup, *, weights: Mapping[str, float], seed: int, workspace: Path, options: Mapping[str, Any] | None = None
) -> Job:
    """One training of the proxy, as a job of the stage `pretrain`; writes its mixture.json."""
    workspace.mkdir(parents=True, exist_ok=True)
    mixture = workspace / "mixture.json"
    scratch.write_json(mixture, {"weights": dict(weights), "evidence": {}})
    return Job(
        pipeline="proxy",
        params=setup.params.model_copy(update={"seed": seed}),
        corpus=setup.corpus,
        model=setup.checkpoint,
        parent=setup.checkpoint,
        mixture=mixture,
        workspace=workspace,
        options=options or {},
    )


def run(job: Job) -> None:
    """Train a job of one process: in this one, or in one of its own if this is a thread beside others.

    A process has one process group, so that what trains at once needs a process each; loading torch takes seconds
    which a process that trains unit after unit spends once.
    """
    from tasks.pretrain.launch import environment, launcher, worker

    if threading.current_thread() is not threading.main_thread():
        launcher.run(job)
        return
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str((scratch.ROOT / "torch_extensions").resolve()))
    environment.complete(os.environ, launcher="local", processes=1)
    job.write()
    with (job.workspace / "output.txt").open("a") as output, contextlib.redirect_stdout(output):
        worker.run(job)
    gc.collect()  # model and optimizer stand in circles of references; the next unit's would come on top


def unseen(checkpoint: Path, setup: Setup) -> dict[str, float]:
    """Loss of a trained proxy on the domains of `setup.also`, in nats per predicted token."""
    from tasks.corpus.sampling import windows
    from tasks.moe import checkpoint as checkpoints
    from tasks.moe import device
    from tasks.moe.loss import window_nll

    params = setup.params
    model = checkpoints.load(checkpoint, device=device.default())
    every = windows.unseen(setup.corpus, seq_len=params.seq_len, count=params.eval_windows)
    return {
        domain: float(window_nll(model, every[domain], batch=params.micro_batch).mean()) / (params.seq_len - 1)
        for domain in setup.also
    }


def flops_per_token(checkpoint: Path, *, seq_len: int) -> int:
    """Of training a checkpoint."""
    from tasks.moe import counts

    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return counts.flops_per_token(config, seq_len=seq_len)["train"]


def cost(problem: Problem, *, tokens: int, flops: float) -> dict[str, float]:
    """The entry `cost` of the evidence: of all proxies, and as a share of the training that the weights are for."""
    assert problem.pretrain is not None
    served = problem.student if (problem.student / "config.json").exists() else problem.model
    training = problem.budget * flops_per_token(served, seq_len=problem.pretrain.seq_len)
    return {
        "tokens": tokens,
        "flops": flops,
        "share_of_training": tokens / problem.budget,
        "flops_share": flops / training,
    }
