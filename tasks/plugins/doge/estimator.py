"""DoGE (arXiv 2310.15393): domains weigh as much as their gradients help the others, or a target.

One proxy, whose steps take the gradient of every domain apart (tasks/plugins/doge). A target's gradient
is of held-out windows, as many in each step as the batch has of a domain.
"""

from __future__ import annotations

import json
from dataclasses import replace

from tasks.mixture.problem import Estimate, Problem
from tasks.plugins.proxy_runs import course
from tasks.plugins.proxy_runs.units import Setup
from tasks.settings.mixture import MEAN, Mixture, Proxy
from tasks.settings.pretrain import Balance


def estimate(problem: Problem) -> Estimate:
    """The mean over seeds.

    Raises:
        ValueError: the corpus does not fit.
        TrainingError, OSError: a proxy cannot be trained; what was finished is kept.
    """
    setup = course.prepare(problem, method="doge")
    # The gradients are the cross-entropy's alone.
    setup = replace(setup, params=setup.params.model_copy(update={"balance": Balance(loss="none")}))
    target = course.target(problem)
    extra = _products(setup, domains=len(problem.tokens), targets=len(target or ()))
    courses = [
        course.run(
            setup,
            {"doge": {"target": target}},
            weights=course.uniform(problem),
            seed=seed,
            work=problem.work,
            extra_flops=extra,
        )
        for seed in course.seeds(problem)
    ]
    means = [each.weights for each in courses]
    return course.estimate(problem, method="doge", means=means, trajectory=courses[0].trajectory, courses=courses)


def _products(setup: Setup, *, domains: int, targets: int) -> float:
    """Floating-point operations of the gradients' products, and of the targets' gradients.

    The backward passes of the domains take no more than one over the batch, since each is over its own windows.
    """
    from tasks.moe import counts

    config = json.loads((setup.checkpoint / "config.json").read_text())
    size = counts.parameters(config)["total"]
    products = setup.params.steps * 2 * size * domains * (targets or domains)
    return products + setup.flops() * targets / domains


def forward_tokens(mixture: Mixture, proxy: Proxy, *, tokens: int, domains: list[str]) -> float:
    """Tokens of forward passes beside the training's own: of a target's gradient, a backward pass as two.

    It is of as many windows as a domain has in the batch. The domains' gradients together cost one over the batch.
    """
    return 0 if mixture.target == MEAN else 3 * tokens * len(mixture.targets(domains)) / len(domains)
