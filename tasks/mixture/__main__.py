"""Estimate the domain weights of a pipeline.

    python -m tasks.mixture PIPELINE

Reads data/corpora/<corpus>/, for methods that measure data/models/<model>/, and for proxies that are students
runs/<pipeline>/moe/. Writes runs/<pipeline>/mixture.json: the weights, the method, and the evidence (the uniform and
proportional mixes to compare with, tokens per domain, epochs of the training budget, the domains whose share a cap on
repetition lowered, what the method measured), mixture.csv, its weights for DVC's plots, and runs/<pipeline>/swarm/,
the finished units of a swarm. Stopped at any moment, even by kill -9, the same command goes on and ends with the same
result.

A swarm's units on machines that share the project's folder, before the command above, which finds them done:

    python -m tasks.mixture PIPELINE --task-index $SLURM_ARRAY_TASK_ID --num-tasks 16
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks import plugin, scratch, settings
from tasks.mixture import methods, plots
from tasks.mixture.problem import Problem, normalise

MARKER = "estimate.txt"


def problem_of(pipeline: str) -> Problem:
    """What a pipeline asks for. Raises ValueError when the settings do not fit the corpus."""
    from tasks.corpus import manifest
    from tasks.corpus.sampling import windows

    entry = settings.load().pipeline(pipeline)
    mixture, corpus = entry.mixture, Path("data/corpora") / entry.corpus
    windows.require(corpus, "test", seq_len=entry.evaluate.seq_len)  # else only found when all is trained
    tokens = {name: domain.train.tokens for name, domain in manifest.load(corpus).trained.items()}
    if mixture.proxy:
        windows.require(corpus, "validation", seq_len=mixture.proxy.seq_len)
    return Problem(
        tokens=tokens,
        weights=mixture.weights,
        alpha=mixture.alpha,
        budget=entry.pretrain.tokens,
        max_epochs=mixture.max_epochs,
        corpus=corpus,
        model=Path("data/models") / entry.model,
        seq_len=entry.evaluate.seq_len,
        windows=mixture.windows,
        pipeline=pipeline,
        student=Path("runs") / pipeline / "moe",
        target=mixture.targets(list(tokens)),
        proxy=mixture.proxy,
        swarm=mixture.swarm,
        mixture=mixture,
        seeds=mixture.seeds,
        pretrain=entry.pretrain,
    )


def run(pipeline: str) -> Path:
    """Write runs/<pipeline>/mixture.json and return its path. Raises ValueError when the settings do not fit.

    How long it took stands in mixture.time.json: what depends on the weights does not depend on the clock.
    """
    problem, method = problem_of(pipeline), settings.load().pipeline(pipeline).mixture.method
    target = Path("runs") / pipeline / "mixture.json"
    started = time.perf_counter()
    with scratch.workspace("mixture", pipeline) as work:
        estimate = methods.estimate(method, dataclasses.replace(problem, work=work))
        evidence: dict[str, Any] = {
            "tokens": problem.tokens,
            "uniform": normalise(methods.uniform(problem).weights),
            "proportional": normalise(methods.proportional(problem).weights),
            **estimate.evidence,
        }
        content: dict[str, Any] = {"weights": estimate.weights, "method": method, "evidence": evidence}
        if problem.proxy:
            content["seed"] = problem.proxy.seed
        scratch.write_json(target, content)
        scratch.write_text(target.with_suffix(".csv"), plots.weights_csv(content))
        taken = round(time.perf_counter() - started, 1)
        scratch.write_json(target.with_name("mixture.time.json"), {"seconds": taken})
        # DVC keeps the folder, and so it is there without a swarm too.
        told = f"{method} has read {len(evidence.get('units', ()))} units\n"
        scratch.write_text(target.with_name("swarm") / MARKER, told)
    for name, weight in estimate.weights.items():
        cap = f", lowered to {problem.max_epochs:g} epochs" if name in evidence["capped"] else ""
        print(f"{name}: weight {weight:.4f} (proportional {evidence['proportional'][name]:.4f}{cap})")
    return target


def share(pipeline: str, *, run: Callable[..., Any] | None = None, index: int = 0, count: int = 1) -> int:
    """Train the units index, index + count, … of a pipeline's swarm, beside others that train theirs.

    Args:
        run: run(train, units) trains the units; one process if absent.

    Returns:
        How many of them were missing.

    Raises:
        ValueError: the pipeline's method has no swarm.
        TrainingError, OSError, scratch.BusyError: what was finished is kept.
    """
    problem = problem_of(pipeline)
    if problem.swarm is None:
        raise ValueError(f"pipelines.{pipeline}.mixture has no `swarm`, whose units could be shared out")
    (swarm,) = plugin.modules("swarm").values()
    with scratch.workspace("mixture", pipeline, shared=True) as work:
        planned = swarm.plan(dataclasses.replace(problem, work=work))
        mine = dataclasses.replace(planned, units=planned.units[index::count])
        missing = len(mine.pending())
        swarm.complete(mine, run=run or swarm.processes(1))
    return missing


def main() -> int:
    """Run the stage, or a share of its swarm's units, for the pipeline named on the command line."""
    from tasks.pretrain.job import TrainingError

    parser = argparse.ArgumentParser(
        prog="python -m tasks.mixture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", help="a name under `pipelines` in pipelines.yaml")
    parser.add_argument("--task-index", type=int, help="train a share of the swarm's units alone: which, from 0")
    parser.add_argument("--num-tasks", type=int, default=1, help="how many shares there are")
    arguments = parser.parse_args()
    index, count, pipeline = arguments.task_index, arguments.num_tasks, arguments.pipeline
    if (index is None and count != 1) or (index is not None and not 0 <= index < count):
        parser.error(f"--task-index {index} is not one of 0 to {count - 1}")
    try:
        if index is None:
            run(pipeline)
        else:
            trained = share(pipeline, index=index, count=count)
            print(f"mixture {pipeline}: {trained} units trained")
    except (ValueError, OSError, TrainingError, scratch.BusyError) as error:
        print(f"mixture: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
