"""One process of a training run.

    python -m tasks.pretrain.worker .scratch/pretrain-<pipeline>/<fingerprint>/job.json

The stage starts it, alone or through torchrun. With `--lifeline` it dies as soon as its standard input closes: the
stage holds the other end, so no worker outlives it, not even after kill -9.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

from tasks import scratch
from tasks.pretrain.job import Job, TrainingError

FAILURE = "failure.json"


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


def _die_with_stage() -> None:
    def wait() -> None:
        os.read(0, 1)  # returns at end of file; sys.stdin would hold a lock at exit
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.pretrain.worker", description="One training process.")
    parser.add_argument("job", type=Path, help="job.json in the stage's workspace")
    parser.add_argument("--lifeline", action="store_true", help="exit when standard input closes")
    arguments = parser.parse_args()
    if arguments.lifeline:
        _die_with_stage()
    job = Job.read(arguments.job)
    try:
        run(job)
    except (TrainingError, ValueError, OSError) as error:
        scratch.write_json(job.workspace / FAILURE, {"message": str(error)})
        if not arguments.lifeline:  # the stage says it otherwise
            print(f"pretrain: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
