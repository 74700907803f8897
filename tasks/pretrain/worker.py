"""One process of a training run.

    python -m tasks.pretrain.worker .scratch/pretrain-<pipeline>/<fingerprint>/job.json

The stage starts it (`launch`). With `--lifeline` it dies as soon as its standard input closes: the
stage holds the other end, so no worker outlives it, not even after kill -9.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tasks.pretrain import place, supervise
from tasks.pretrain.job import Job


def run(job: Job) -> None:
    """Train and write the results into the workspace. Raises TrainingError or ValueError for the user to read."""
    from tasks.moe import checkpoint, gate
    from tasks.pretrain import engine as engines
    from tasks.pretrain import outputs
    from tasks.pretrain.loop import Place, Trainer

    rank, world_size, device = engines.initialise(job.workspace)
    try:
        import torch

        torch.manual_seed(job.params.seed)
        dtype = engines.precision(job.params.precision, device)
        model = checkpoint.load(job.model, dtype=dtype, device=device)
        gate.swap_in(model, gate.read(job.model))  # before the engine gathers its parameters
        model.train()
        if job.params.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        config = engines.configuration(job.params, world_size=world_size, dtype=dtype)
        engine = engines.build(model, job.params, config=config)
        trainer = Trainer(job, engine=engine, place=Place(rank=rank, world_size=world_size, device=device))
        with trainer.loader:
            trainer.run()
            outputs.write(trainer, config=config)
        torch.distributed.barrier()
    finally:
        engines.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.pretrain.worker", description="One training process.")
    parser.add_argument("job", type=Path, help="job.json in the stage's workspace")
    parser.add_argument("--lifeline", action="store_true", help="exit when standard input closes")
    arguments = parser.parse_args()
    job = Job.read(arguments.job)

    def train() -> None:
        place.adopt(os.environ, launcher=job.params.launcher, processes=job.params.processes)
        run(job)

    return supervise.run(train, workspace=job.workspace, lifeline=arguments.lifeline)


if __name__ == "__main__":
    sys.exit(main())
