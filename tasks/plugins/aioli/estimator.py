"""Aioli (arXiv 2411.05735): domains weigh as much as sweeps over mixes of mostly one make the losses fall.

One proxy, whose batches change their mix (tasks/plugins/aioli). The estimate is the mean over its updates.
An update multiplies a weight by at most e^0.2 against another, so a small budget moves little.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from tasks.mixture.problem import Estimate, Problem
from tasks.plugins.proxy_runs import course
from tasks.plugins.proxy_runs.units import Setup
from tasks.settings.mixture import Mixture, Proxy

UPDATES, SWEEPS, SWEEP_STEPS = 20, 4, 4
"""The paper's, in 5,000 steps; fewer where sweeps would take more than half of a round."""


class Rounds(NamedTuple):
    """Into which the steps are divided; each begins with its sweeps over all domains."""

    updates: int
    sweeps: int
    sweep_steps: int
    """Steps on the mix about one domain."""


def estimate(problem: Problem) -> Estimate:
    """The mean over seeds.

    Raises:
        ValueError: the corpus does not fit, or the budget has no room for a sweep.
        TrainingError, OSError: a proxy cannot be trained; what was finished is kept.
    """
    setup = course.prepare(problem, method="aioli")
    rounds = plan(setup.params.steps, domains=len(problem.tokens))
    options = {"aioli": rounds._asdict() | {"target": course.target(problem)}}
    extra = _evaluations(setup, rounds, domains=len(problem.tokens))
    courses = [
        course.run(setup, options, weights=course.uniform(problem), seed=seed, work=problem.work, extra_flops=extra)
        for seed in course.seeds(problem)
    ]
    means = [each.weights for each in courses]
    return course.estimate(problem, method="aioli", means=means, trajectory=courses[0].trajectory, courses=courses)


def plan(steps: int, *, domains: int) -> Rounds:
    """Rounds and sweeps that fit so many steps: sweeps take half of a round at most.

    Raises:
        ValueError: there is no room for one sweep of a step on each domain.
    """
    if steps < 2 * domains:
        raise ValueError(
            f"mixture.proxy.tokens give {steps} steps, and a sweep over {domains} domains and as many steps after it "
            f"take {2 * domains}; give more tokens, or a smaller batch"
        )
    updates = min(UPDATES, max(1, steps // (2 * SWEEP_STEPS * domains)))
    half = steps // updates // (2 * domains)
    return Rounds(updates=updates, sweeps=min(SWEEPS, max(1, half // SWEEP_STEPS)), sweep_steps=min(SWEEP_STEPS, half))


def evaluations(rounds: Rounds, *, domains: int) -> int:
    """How often the losses are measured for the rounds."""
    return rounds.updates * (1 + rounds.sweeps * domains)


def _evaluations(setup: Setup, rounds: Rounds, *, domains: int) -> float:
    """Floating-point operations of the evaluations between sweeps."""
    from tasks.moe import counts

    config = json.loads((setup.checkpoint / "config.json").read_text())
    forward = counts.flops_per_token(config, seq_len=setup.params.seq_len)["forward"]
    windows = (domains + len(setup.also)) * setup.params.eval_windows
    return float(evaluations(rounds, domains=domains) * windows * setup.params.seq_len * forward)


def forward_tokens(mixture: Mixture, proxy: Proxy, *, tokens: int, domains: list[str]) -> float:
    """Tokens of forward passes beside the training's own: the evaluations after each of the sweeps."""
    rounds = plan(tokens // (proxy.batch * proxy.seq_len), domains=len(domains))
    measured = len({*domains, *mixture.targets(domains)})
    return evaluations(rounds, domains=len(domains)) * measured * proxy.windows * proxy.seq_len
