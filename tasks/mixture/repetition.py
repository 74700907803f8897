"""Repetition: no domain is read more often than the text is worth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tasks.mixture.problem import Problem


def capped(
    weights: Mapping[str, float], *, tokens: Mapping[str, int], budget: int, max_epochs: float
) -> tuple[dict[str, float], list[str]]:
    """The weights closest in proportion that repeat no domain more than `max_epochs` times, and which a cap binds.

    What a domain may not have goes to the others in proportion to their weights, as often as needed. From equal
    weights that is UniMax (arXiv 2304.09151, algorithm 1).

    Args:
        weights: sum 1; a domain of weight 0 stays out.
        tokens: training tokens of each domain.
        budget: tokens that training reads.
        max_epochs: at most so often.

    Raises:
        ValueError: the budget is more than all domains of a positive weight together, so often.
    """
    limits = {domain: max_epochs * tokens[domain] / budget for domain, weight in weights.items() if weight > 0}
    if (all_of_them := sum(limits.values())) < 1 - 1e-9:
        least = max_epochs / all_of_them
        raise ValueError(
            f"mixture.max_epochs = {max_epochs:g}: pretrain.tokens = {budget} are {least:.4g} epochs of the "
            f"{sum(tokens[domain] for domain in limits)} training tokens of {', '.join(limits)}; train on fewer "
            f"tokens, add text, or set mixture.max_epochs to {least * 1.01:.3g} or more"
        )
    bound: dict[str, float] = {}
    while len(bound) < len(limits):
        free = {domain: weights[domain] for domain in limits if domain not in bound}
        scale = (1 - sum(bound.values())) / sum(free.values())
        over = {domain: limits[domain] for domain, weight in free.items() if weight * scale > limits[domain] + 1e-12}
        if not over:
            return dict.fromkeys(weights, 0.0) | bound | {d: weight * scale for d, weight in free.items()}, [*bound]
        bound |= over
    return dict.fromkeys(weights, 0.0) | bound, [*bound]


def caps(problem: Problem) -> NDArray[np.float64]:
    """The largest share of each domain that repeats it `max_epochs` times in training at most, [D]."""
    return np.array([problem.max_epochs * tokens / problem.budget for tokens in problem.tokens.values()])
