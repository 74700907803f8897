"""Proxies that estimate domain weights while they train: one course, and the mean over several seeds.

A course is kept in the stage's workspace under a digest of all that it depends on, with the checkpoints of its
training. Work that was killed goes on from there and ends with the same numbers.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks import scratch
from tasks.mixture.problem import Estimate, Problem, normalise
from tasks.plugins.proxy_runs import models, units
from tasks.plugins.proxy_runs.units import Setup
from tasks.pretrain.job import Diverged

DONE, TRAINED = "done.json", "trained"
SAVES = 8
"""Checkpoints of a course."""
POINTS = 100
"""Of a trajectory that mixture.json shows."""
ONE_HOT = 0.9
"""A share above which a mix is hardly one."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a training came to."""

    weights: dict[str, float]
    """The mean of the weights that it estimated; {} of a training that estimated none."""
    trajectory: list[dict[str, Any]]
    """{step, weights} of the weights in use, over the steps of this training."""
    steps: int
    tokens: int
    flops: float
    folder: Path


def prepare(problem: Problem, *, method: str) -> Setup:
    """Write the proxy's checkpoint and say how it is trained: batches hold every domain, all equally often.

    Raises:
        ValueError: the corpus has one domain, or a domain has not one whole window.
        FileNotFoundError: the student or the parent is not there.
    """
    from tasks.corpus.sampling.loader import train_windows

    proxy, pretrain, domains = problem.proxy, problem.pretrain, list(problem.tokens)
    assert proxy is not None
    assert pretrain is not None
    if len(domains) < 2:
        raise ValueError(
            f"mixture.method = {method!r} weighs domains against each other, and {problem.corpus} has {domains[0]} "
            "alone; set method: uniform"
        )
    counts = train_windows(problem.corpus, domains, seq_len=proxy.seq_len, packing=pretrain.packing)
    if short := [domain for domain, count in counts.items() if count < 1]:
        raise ValueError(
            f"{problem.corpus}: {', '.join(short)} has not one training window of mixture.proxy.seq_len = "
            f"{proxy.seq_len} tokens; give it more text, lower seq_len, or leave it out of the corpus"
        )
    proxy = proxy.holding(len(domains))
    params = units.training(proxy, pretrain)
    return Setup(
        checkpoint=models.make(proxy, parent=problem.model, student=problem.student, folder=problem.work / "proxy"),
        corpus=problem.corpus,
        params=params.model_copy(update={"save_every": -(-params.steps // SAVES)}),
        also=tuple(domain for domain in problem.target if domain not in problem.tokens),
    )


def uniform(problem: Problem) -> dict[str, float]:
    """The mix of the batches in which weights are estimated."""
    return dict.fromkeys(problem.tokens, 1 / len(problem.tokens))


def run(
    setup: Setup,
    options: Mapping[str, Any],
    *,
    weights: Mapping[str, float],
    seed: int,
    work: Path,
    extra_flops: float = 0.0,
) -> Course:
    """Train a proxy on a mix, estimating by a method, unless that is done.

    Args:
        options: of the method, as {method: its options}; {} estimates nothing.
        weights: of the batches, sum 1.
        work: of the stage.
        extra_flops: that the method takes besides training.

    Raises:
        Diverged: a loss is not finite.
        TrainingError, ValueError, OSError: it cannot be trained, and why.
    """
    named = {  # a reference by its key; the folder may be gone
        method: own | {"reference": Path(own["reference"]).parent.name} if "reference" in own else own
        for method, own in options.items()
    }
    key = scratch.fingerprint([setup.base(), setup.domains(), named, dict(weights), seed])
    folder = work / "courses" / key
    if not (folder / DONE).exists():
        _train(setup, options, weights=weights, seed=seed, folder=folder)
    done = json.loads((folder / DONE).read_text())
    return Course(
        weights=done["weights"],
        trajectory=done["trajectory"],
        steps=setup.params.steps,
        tokens=setup.tokens,
        flops=setup.flops() + extra_flops,
        folder=folder,
    )


def _train(setup: Setup, options: Mapping[str, Any], *, weights: Mapping[str, float], seed: int, folder: Path) -> None:
    from tasks.pretrain.log import log_file

    job = units.job_of(setup, weights=weights, seed=seed, workspace=folder, options=options)
    what = next(iter(options), "reference")
    print(f"{what}: training a proxy for {setup.params.steps} steps, seed {seed}", flush=True)
    try:
        units.run(job)
    except Diverged as error:
        why = str(error).partition(". Kept")[0]
        raise Diverged(f"the proxy of {what} diverges: {why}; lower mixture.proxy.learning_rate") from error
    records = log_file.read(folder / "training/log.jsonl", "step", "validation")
    course = [
        {"step": record["step"], "weights": record["estimate"]["weights"]}
        for record in records
        if "estimate" in record
    ]
    mean = json.loads((folder / "pretrain.json").read_text()).get("estimate", {})
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    scratch.write_json(folder / DONE, {"weights": mean, "trajectory": thinned(course)})


def thinned(points: Sequence[Any]) -> list[Any]:
    """At most POINTS of the points, evenly spread, the last among them."""
    every = -(-len(points) // POINTS) or 1
    return list(points[::-1][::every][::-1])


def joined(rounds: Sequence[Course]) -> list[dict[str, Any]]:
    """The trajectories of one training after the other, their steps counted on."""
    points, before = [], 0
    for course in rounds:
        points += [{**point, "step": point["step"] + before} for point in course.trajectory]
        before += course.steps
    return thinned(points)


def estimate(
    problem: Problem,
    *,
    method: str,
    means: Sequence[Mapping[str, float]],
    trajectory: list[dict[str, Any]],
    courses: Sequence[Course],
) -> Estimate:
    """The mean over seeds, and what it rests on and took. Deletes what is no longer needed of the work.

    Args:
        means: of each seed.
        trajectory: of the first.
        courses: all trainings.
    """
    weights = normalise({d: math.fsum(mean[d] for mean in means) / len(means) for d in problem.tokens})
    evidence: dict[str, Any] = {
        "trajectory": trajectory,
        "cost": units.cost(problem, tokens=sum(c.tokens for c in courses), flops=sum(c.flops for c in courses)),
    }
    if len(means) > 1:
        deviation = {d: float(np.std([mean[d] for mean in means], ddof=1)) for d in problem.tokens}
        evidence |= {"spread": deviation, "spread_over": "seeds"}
    for domain, weight in weights.items():
        if weight > ONE_HOT:
            print(
                f"warning: {method} gives {domain} {weight:.2f} of the mix. Train the proxy on more tokens"
                + ("; or lower mixture.doremi.step_size" if method == "doremi" else ""),
                flush=True,
            )
    used = {course.folder.name for course in courses}
    for folder in (problem.work / "courses").iterdir():
        if folder.name in used:
            shutil.rmtree(folder / TRAINED, ignore_errors=True)
        else:
            shutil.rmtree(folder)
    return Estimate(weights=weights, evidence=evidence)


def seeds(problem: Problem) -> list[int]:
    """Of the trainings whose mean is the estimate."""
    assert problem.proxy is not None
    return [(problem.proxy.seed + number) % (1 << 32) for number in range(problem.seeds)]


def target(problem: Problem) -> dict[str, float] | None:
    """The target's domains of a positive weight; None if it is the mean of the trained ones."""
    if problem.target == uniform(problem):
        return None
    return {domain: weight for domain, weight in problem.target.items() if weight > 0}
