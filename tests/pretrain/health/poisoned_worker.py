"""A training process in which something goes wrong: main(JOB, "KIND=VALUE", ...).

nan=DOMAIN/WINDOW   the loss of a batch that holds this window is NaN
spike=step/N        the loss of step N is 100 times what it is
dead=LAYER/EXPERT   the router of this sparse layer never chooses this expert
die=N               kill -9 when N steps have been logged
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from tasks.moe import gate
from tasks.pretrain.health.loss_guard import LossGuard
from tasks.pretrain.job import Job
from tasks.pretrain.launch import worker
from tasks.pretrain.log.run_log import RunLog
from tasks.pretrain.loss.losses import Losses
from tasks.pretrain.loss.objective import Objective


def spoil(factor: float, domain: str, window: int) -> None:
    compute, judge, now = Objective.__call__, LossGuard.decide, [0]

    def noted(self: LossGuard, *, step: int, **given: Any) -> Any:
        now[0] = step + 1
        return judge(self, step=step, **given)

    def spoiled(self: Objective, batch: Any, *, rows: slice, device: Any) -> Losses:
        losses = compute(self, batch, rows=rows, device=device)
        slots = zip(batch.domains[rows], batch.windows[rows], strict=True)
        if not (now[0] == window if domain == "step" else (domain, window) in slots):
            return losses
        return Losses(nats_B=losses.nats_B * factor, parts=losses.parts, total=losses.total * factor)

    Objective.__call__ = spoiled  # type: ignore[method-assign]
    LossGuard.decide = noted  # type: ignore[method-assign]


def starve(layer: int, expert: int) -> None:
    add = gate.add_bias

    def added(model: Any) -> None:
        add(model)
        values = gate.biases(model)
        values[layer][expert] = -100.0
        gate.set_biases(model, values)

    gate.add_bias = added


def die(after: int) -> None:
    write, logged = RunLog.step, []

    def counted(self: RunLog, *given: Any, **named: Any) -> None:
        write(self, *given, **named)
        logged.append(None)
        if len(logged) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    RunLog.step = counted  # type: ignore[method-assign]


def main(job: str, *poison: str) -> None:
    torch.set_num_threads(1)
    for pair in poison:
        kind, _, value = pair.partition("=")
        where, _, number = value.partition("/")
        if kind in {"nan", "spike"}:
            spoil(float("nan") if kind == "nan" else 100.0, where, int(number))
        elif kind == "dead":
            starve(int(where), int(number))
        else:
            die(int(value))
    worker.run(Job.read(Path(job)))
