"""The estimator of a job, made for the model in the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tasks.pretrain.domains.plan import DoGE, DoReMi, Plan, normalised
from tasks.pretrain.job import Job, TrainingError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tasks.pretrain.domains.alignment import Alignment
    from tasks.pretrain.domains.excess import Excess
    from tasks.pretrain.domains.sweeps import Sweeps
    from tasks.pretrain.engine.interface import Engine
    from tasks.pretrain.launch.process import Process
    from tasks.pretrain.loss.objective import Objective


def load(
    job: Job, *, shares: Mapping[str, float], engine: Engine, objective: Objective, process: Process
) -> Excess | Alignment | Sweeps | None:
    """The estimator that a job asks for, or None.

    Args:
        shares: the job's mixture, sum 1.

    Raises:
        TrainingError: the plan does not fit the settings, the corpus or the models.
    """
    plan = job.estimate
    if plan is None:
        return None
    _check(job, plan, shares)
    if isinstance(plan, DoReMi):
        return _excess(job, plan, shares, engine=engine, process=process)
    domains, params = list(shares), job.params
    if isinstance(plan, DoGE):
        from tasks.pretrain.domains.alignment import Alignment

        each = params.batch // len(domains)
        return Alignment(
            params,
            engine,
            domains=domains,
            target=normalised(plan.target) if plan.target else None,
            windows=held_out(job, plan.target or {}, count=each * params.steps),  # fewer if there are no more
            objective=objective,
            process=process,
        )
    from tasks.pretrain.domains.sweeps import Sweeps
    from tasks.pretrain.validation import Validation

    target = normalised(plan.target or dict.fromkeys(domains, 1.0))
    unseen = held_out(job, target, count=params.eval_windows)
    for domain in domains:
        unseen.pop(domain, None)
    return Sweeps(
        plan,
        domains=domains,
        target=target,
        unseen=Validation(windows=unseen, references=None) if unseen else None,
        steps=params.steps,
        seed=params.seed,
    )


def held_out(job: Job, target: Mapping[str, float], *, count: int) -> dict[str, NDArray[np.int64]]:
    """Windows of each domain of a target, int64 [<= count, seq_len]: of the validation split, of the test split where
    nothing else is held out because nothing is trained on.

    Raises:
        TrainingError: the corpus has no such domain.
    """
    from tasks.corpus.sampling import windows

    if not target:
        return {}
    seq_len = job.params.seq_len
    every = windows.validation(job.corpus, seq_len=seq_len, count=count)
    if target.keys() - every.keys():
        every |= windows.unseen(job.corpus, seq_len=seq_len, count=count)
    if unknown := sorted(target.keys() - every.keys()):
        raise TrainingError(
            f"mixture.target: {job.corpus} has no domain {', '.join(unknown)}; it has {', '.join(sorted(every))}"
        )
    return {domain: every[domain] for domain in target}


def _check(job: Job, plan: Plan, shares: Mapping[str, float]) -> None:
    params, method = job.params, plan.method
    if len(shares) < 2:
        raise TrainingError(
            f"{method} weighs domains against each other, and {job.corpus} has one: {', '.join(shares)}"
        )
    if zeros := [domain for domain, share in shares.items() if share <= 0]:
        raise TrainingError(
            f"{method} needs text of every domain, and {', '.join(zeros)} has the weight 0 in {job.mixture}; give it "
            "a small one, or leave it out of the corpus"
        )
    for field in ("distill", "dynamic"):
        if getattr(params, field) is not None:
            raise TrainingError(
                f"pretrain.{field} and an estimate by {method} both weigh the loss or the domains; drop one"
            )
    if not isinstance(plan, DoGE):
        return
    if params.zero_stage == 3 or params.expert_parallel > 1:
        raise TrainingError(
            "doge takes gradients of whole weights; it needs zero_stage 0, 1 or 2 and expert_parallel 1"
        )
    if params.balance.loss != "none" or params.balance.z_loss:
        raise TrainingError("doge takes gradients of the cross-entropy alone; set balance: {loss: none, z_loss: 0}")
    if params.batch % len(shares) or max(shares.values()) - min(shares.values()) > 1e-6:
        raise TrainingError(
            f"doge needs every domain in every batch; make batch = {params.batch} a multiple of the {len(shares)} "
            "domains, and their weights equal"
        )


def _excess(job: Job, plan: DoReMi, shares: Mapping[str, float], *, engine: Engine, process: Process) -> Excess:
    from pathlib import Path

    from tasks.moe import checkpoint, gate
    from tasks.pretrain.domains.excess import Excess

    reference = checkpoint.load(Path(plan.reference), dtype=engine.dtype, device=process.device)
    gate.swap_in(reference, gate.read(Path(plan.reference)))
    sizes = [model.config.vocab_size for model in (reference, engine.module)]
    if sizes[0] != sizes[1]:
        raise TrainingError(
            f"doremi compares token by token: the reference {plan.reference} has vocab_size = {sizes[0]}, and the "
            f"model {job.model} has {sizes[1]}; give it a reference of the same tokenizer"
        )
    return Excess(
        reference,
        shares=shares,
        micro_batch=job.params.micro_batch,
        vocabulary=sizes[1],
        process=process,
        step_size=plan.step_size,
    )
