"""DoReMi (arXiv 2305.10429): domains weigh as much as a proxy's loss on them exceeds that of a reference.

Reference and proxy begin with the same checkpoint and train on as many tokens. The reference sees the baseline mix;
the proxy sees all domains equally often, and its loss is weighed by domain (tasks/plugins/doremi). In a
further round the estimate is the baseline.
"""

from __future__ import annotations

import json
from typing import Any

from tasks.mixture.problem import Estimate, Problem, prior
from tasks.plugins.doremi import settings
from tasks.plugins.proxy_runs import course
from tasks.plugins.proxy_runs.course import Course
from tasks.plugins.proxy_runs.units import Setup
from tasks.settings.mixture import Proxy


def estimate(problem: Problem) -> Estimate:
    """The mean over seeds of the last round's weights.

    Raises:
        ValueError: a domain's baseline is 0, or the corpus does not fit.
        TrainingError, OSError: a proxy cannot be trained; what was finished is kept.
    """
    setup, baseline = course.prepare(problem, method="doremi"), prior(problem)
    constants = _constants(problem.mixture)
    means: list[dict[str, float]] = []
    every: list[Course] = []
    first: list[Course] = []
    for seed in course.seeds(problem):
        mean, rounds = dict(baseline), []
        for _ in range(constants.rounds):
            reference = course.run(setup, {}, weights=mean, seed=seed, work=problem.work)
            options = {"reference": str(reference.folder / course.TRAINED), "step_size": constants.step_size}
            proxy = course.run(
                setup,
                {"doremi": options},
                weights=course.uniform(problem),
                seed=seed,
                work=problem.work,
                extra_flops=_scoring(setup),
            )
            mean = proxy.weights
            rounds.append(proxy)
            every += [reference, proxy]
        means.append(mean)
        first = first or rounds
    return course.estimate(problem, method="doremi", means=means, trajectory=course.joined(first), courses=every)


def _scoring(setup: Setup) -> float:
    """Floating-point operations of the reference's forward passes, and of the proxy's where micro-batches take one."""
    from tasks.moe import counts

    config = json.loads((setup.checkpoint / "config.json").read_text())
    forward = counts.flops_per_token(config, seq_len=setup.params.seq_len)["forward"]
    passes = 2 if setup.params.micro_batch < setup.params.batch else 1
    return float(passes * setup.tokens * forward)


def trainings(mixture: Any) -> int:
    """Of a proxy: a reference and then a proxy against it, in every round."""
    return 2 * _constants(mixture).rounds


def forward_tokens(mixture: Any, proxy: Proxy, *, tokens: int, domains: list[str]) -> float:
    """Tokens of forward passes beside the training's own.

    The reference runs on every batch, and where a batch has several micro-batches the proxy once more.
    """
    passes = 2 if (proxy.micro_batch or proxy.batch) < proxy.batch else 1
    return _constants(mixture).rounds * tokens * passes


def _constants(mixture: Any) -> settings.DoReMi:
    return getattr(mixture, "doremi", None) or settings.DoReMi()
