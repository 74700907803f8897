"""Continually pre-train the converted model of a pipeline.

    python -m tasks.pretrain PIPELINE [--discard | --branch OTHER [--step N]]

Reads runs/<pipeline>/{moe/,mixture.json} and data/corpora/<corpus>/; writes runs/<pipeline>/{trained/,training/,
pretrain.json,loss.csv,validation.csv}. Stopped at any moment, even by kill -9, the same command goes on from the last
checkpoint and ends with the same weights and the same log. With --discard, it deletes the unfinished work instead;
with --branch, the next run begins where a kept checkpoint of another pipeline is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tasks import scratch, settings
from tasks.pretrain import inputs, outputs
from tasks.pretrain.checkpoints import branch as branches
from tasks.pretrain.checkpoints import resume
from tasks.pretrain.job import Job, TrainingError
from tasks.pretrain.launch import launcher
from tasks.pretrain.log import trackers


def run(pipeline: str) -> Path:
    """Train `pipeline` and return runs/<pipeline>/trained.

    Raises:
        SettingsError, TrainingError, scratch.BusyError: with a message that says how to fix it.
    """
    entry = settings.load().pipeline(pipeline)
    root, corpus = Path("runs") / pipeline, Path("data/corpora") / entry.corpus
    parent = Path("data/models") / entry.model
    read = inputs.digests(entry, model=root / "moe", mixture=root / "mixture.json")
    trackers.check(entry.pretrain.trackers)
    with resume.workspace(pipeline, params=entry.pretrain, inputs=read) as (workspace, notes):
        for note in notes:
            print(note, flush=True)
        job = Job(
            pipeline=pipeline,
            params=entry.pretrain,
            corpus=corpus,
            model=root / "moe",
            parent=parent,
            mixture=root / "mixture.json",
            workspace=workspace,
        )
        launcher.run(job)
        outputs.publish(job)
    return root / "trained"


def branch(pipeline: str, other: str, *, step: int | None) -> str:
    """Begin the run of `pipeline` where a checkpoint of `other` is; raises as `run` does."""
    entry = settings.load().pipeline(pipeline)
    root = Path("runs") / pipeline
    read = inputs.digests(entry, model=root / "moe", mixture=root / "mixture.json")
    return branches.branch(pipeline, other, step=step, params=entry.pretrain, inputs=read)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.pretrain", description="Continually pre-train a pipeline.")
    parser.add_argument("pipeline", help="a name under `pipelines` in pipelines.yaml")
    parser.add_argument("--discard", action="store_true", help="delete its unfinished training, and train nothing")
    parser.add_argument("--branch", metavar="OTHER", help="begin from a checkpoint of OTHER, and train nothing yet")
    parser.add_argument("--step", type=int, help="of that checkpoint; the newest that fits if absent")
    arguments = parser.parse_args()
    pipeline = arguments.pipeline
    if (arguments.branch and arguments.discard) or (arguments.step is not None and not arguments.branch):
        parser.error("--step goes with --branch, and --discard goes alone")
    try:
        if arguments.branch:
            print(branch(pipeline, arguments.branch, step=arguments.step))
        else:
            print(resume.discard(pipeline) if arguments.discard else run(pipeline))
    except (ValueError, TrainingError, scratch.BusyError, OSError) as error:
        print(f"pretrain {pipeline}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
