"""One process of a training run.

    python -m tasks.pretrain.launch.worker .scratch/pretrain-<pipeline>/<fingerprint>/job.json

The stage starts it (`launcher`). With `--lifeline` it ends as soon as its standard input closes: the stage holds the
other end, so no worker outlives it, not even after kill -9.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import plugin
from tasks.pretrain.checkpoints import random_state
from tasks.pretrain.job import Job, TrainingError
from tasks.pretrain.launch import environment, out_of_memory, supervise

if TYPE_CHECKING:
    import torch


def run(job: Job) -> None:
    """Train and write the results into the workspace.

    Raises:
        TrainingError, ValueError, OSError: for the user to read; memory that ran out among them.
    """
    from tasks.pretrain.engine import distributed

    rank, world_size, device = distributed.join(job.workspace)
    try:
        _train(job, rank=rank, world_size=world_size, device=device)
    except (RuntimeError, MemoryError) as error:
        if message := out_of_memory.explain(error, job.params):
            raise TrainingError(message) from error
        raise
    finally:
        distributed.leave()


def _train(job: Job, *, rank: int, world_size: int, device: torch.device) -> None:
    import torch

    from tasks.moe import block, checkpoint
    from tasks.pretrain import assembly, outputs
    from tasks.pretrain.engine import distributed
    from tasks.pretrain.launch.process import Process
    from tasks.pretrain.loop import Trainer
    from tasks.pretrain.loss.distil import Distiller

    params = job.params
    hosts = distributed.gather(socket.gethostname(), world_size=world_size)
    dtype = assembly.precision(params, device)
    distiller = Distiller.load(job, device=device, dtype=dtype)  # may fill its shards, which needs no student
    model = checkpoint.load(job.model, dtype=dtype, device=device)
    block.swap_in(model, job.model)  # before the engine gathers its parameters
    for module in plugin.modules("hooks").values():
        if prepare := getattr(module, "prepare", None):
            prepare(model, job)
    engine, objective = assembly.build(model, params, distiller=distiller)
    random_state.reseed(params.seed, step=0, rank=rank)  # ranks must not draw the same noise
    process = Process(rank=rank, world_size=world_size, device=device, hosts=hosts)
    trainer = Trainer(job, engine=engine, objective=objective, process=process)
    with contextlib.closing(engine), trainer.loader:
        trainer.run()
        outputs.write(trainer)
    torch.distributed.barrier()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.pretrain.launch.worker", description="One training process."
    )
    parser.add_argument("job", type=Path, help="job.json in the stage's workspace")
    parser.add_argument("--lifeline", action="store_true", help="exit when standard input closes")
    arguments = parser.parse_args()
    job = Job.read(arguments.job)

    def train() -> None:
        environment.complete(os.environ, launcher=job.params.launcher, processes=job.params.processes)
        run(job)

    return supervise.run(train, workspace=job.workspace, lifeline=arguments.lifeline)


if __name__ == "__main__":
    sys.exit(main())
