"""A training process in which something goes wrong, as `python poisoned_worker.py JOB KIND=VALUE ...`.

nan=DOMAIN/WINDOW   the loss of a batch that holds this window is NaN
spike=DOMAIN/WINDOW it is 100 times what it is
dead=LAYER/EXPERT   the router of this sparse layer never chooses this expert
die=N               kill -9 when N steps have been logged
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from tasks.moe import gate
from tasks.pretrain.job import Job
from tasks.pretrain.launch import worker
from tasks.pretrain.log.run_log import RunLog
from tasks.pretrain.loss.objective import Losses, Objective


def spoil(factor: float, domain: str, window: int) -> None:
    compute, passes = Objective.__call__, [0]

    def spoiled(self: Objective, batch: Any, *, rows: slice, device: Any) -> Losses:
        found = compute(self, batch, rows=rows, device=device)
        if domain == "last":
            mine = self.params.steps == passes[0] // (self.params.batch // self.params.micro_batch) + 1
        else:
            mine = (domain, window) in list(zip(batch.domains[rows], batch.windows[rows], strict=True))
        passes[0] += 1
        if not mine:
            return found
        return Losses(nats_B=found.nats_B * factor, parts=found.parts, total=found.total * factor)

    Objective.__call__ = spoiled  # type: ignore[method-assign]


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


if __name__ == "__main__":
    for pair in sys.argv[2:]:
        kind, _, value = pair.partition("=")
        where, _, number = value.partition("/")
        if kind in {"nan", "spike"}:
            spoil(float("nan") if kind == "nan" else 100.0, where, int(number))
        elif kind == "dead":
            starve(int(where), int(number))
        else:
            die(int(value))
    worker.run(Job.read(Path(sys.argv[1])))
