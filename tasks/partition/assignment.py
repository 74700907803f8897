"""Balanced assignment: every expert gets the same number of neurons, at the least total cost."""

from __future__ import annotations

import numpy as np

EXACT = 4096
"""Up to this many neurons the assignment is optimal (Jonker-Volgenant, 0.5 s at 1536); above it is greedy."""


def balanced(cost_NG: np.ndarray, *, sizes_G: np.ndarray) -> np.ndarray:
    """Assign N neurons to G groups that hold sizes_G neurons, which sum to N.

    Args:
        cost_NG: cost of neuron n in group g.
        sizes_G: int, neurons per group.

    Returns:
        group of each neuron, int64 [N]. Deterministic.
    """
    neurons, groups = cost_NG.shape
    if sizes_G.sum() != neurons:
        raise ValueError(f"groups hold {sizes_G.sum()} neurons, but there are {neurons}")
    if neurons > EXACT:
        return _greedy(cost_NG, sizes_G)
    from scipy.optimize import linear_sum_assignment

    place = np.repeat(np.arange(groups), sizes_G)
    _, column = linear_sum_assignment(cost_NG[:, place])
    return place[column]


def _greedy(cost_NG: np.ndarray, sizes_G: np.ndarray) -> np.ndarray:
    """In rounds, each neuron asks for its cheapest open group; groups take those that would lose most elsewhere."""
    free_G, group_N = sizes_G.copy(), np.full(len(cost_NG), -1)
    waiting = np.arange(len(cost_NG))
    while len(waiting):
        open_cost = np.where(free_G > 0, cost_NG[waiting], np.inf)
        wish = open_cost.argmin(1)
        best = open_cost.min(1)
        open_cost[np.arange(len(waiting)), wish] = np.inf
        second = open_cost.min(1)
        regret = np.where(np.isfinite(second), second - best, 0.0)
        order = np.lexsort((waiting, -regret, wish))
        asked = wish[order]
        first = np.searchsorted(asked, asked)  # where each group's queue begins
        taken = order[np.arange(len(order)) - first < free_G[asked]]
        group_N[waiting[taken]] = wish[taken]
        free_G = free_G - np.bincount(wish[taken], minlength=len(free_G))
        waiting = np.flatnonzero(group_N < 0)
    return group_N
