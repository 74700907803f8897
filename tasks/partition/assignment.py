"""Balanced assignment: every group gets its number of rows, at the least total cost; and k-means built on it."""

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
    result: np.ndarray = place[column]
    return result


def members(group_N: np.ndarray, *, size: int) -> np.ndarray:
    """The rows of each group, ascending: int32 [G, size], from the group of each row, all groups of one size."""
    return np.argsort(group_N, kind="stable").reshape(-1, size).astype(np.int32)


def kmeans(
    rows_NP: np.ndarray,
    *,
    sizes_G: np.ndarray,
    generator: np.random.Generator,
    cosine: bool = False,
    rounds: int = 100,
) -> np.ndarray:
    """Balanced k-means: Lloyd's rounds with `balanced` as their assignment, from a k-means++ start.

    Args:
        rows_NP: float, what is clustered.
        sizes_G: int, rows per cluster; they sum to N.
        generator: of the start; everything after it is determined.
        cosine: rows and centres are taken on the unit sphere (spherical k-means).
        rounds: at most.

    Returns:
        cluster of each row, int64 [N]. The rounds end when no row moves or the total cost no longer falls.
    """
    if cosine:
        rows_NP = _unit(rows_NP)
    squares_N = np.square(rows_NP).sum(1)
    centres_GP = rows_NP[_seeds(rows_NP, squares_N, count=len(sizes_G), generator=generator)]
    group_N, least = np.full(len(rows_NP), -1), np.inf
    for _ in range(rounds):
        # On the sphere the angle counts: by distance, a centre of length zero would be nearer than any other.
        cost_NG = -(rows_NP @ centres_GP.T) if cosine else _distances(rows_NP, squares_N, centres_GP)
        found_N = balanced(cost_NG, sizes_G=sizes_G)
        total = cost_NG[np.arange(len(cost_NG)), found_N].sum()
        if total >= least or np.array_equal(found_N, group_N):
            break
        group_N, least = found_N, total
        centres_GP = np.stack([rows_NP[group_N == group].mean(0) for group in range(len(sizes_G))])
        if cosine:
            centres_GP = _unit(centres_GP)
    return group_N


def _seeds(rows_NP: np.ndarray, squares_N: np.ndarray, *, count: int, generator: np.random.Generator) -> list[int]:
    """k-means++: each centre a row, drawn in proportion to its squared distance from the centres before it."""
    places = [int(generator.integers(len(rows_NP)))]
    nearest_N = np.full(len(rows_NP), np.inf)
    while len(places) < count:
        nearest_N = np.minimum(nearest_N, _distances(rows_NP, squares_N, rows_NP[places[-1:]])[:, 0])
        nearest_N[places] = 0
        total = nearest_N.sum()
        places.append(int(generator.choice(len(rows_NP), p=nearest_N / total if total > 0 else None)))
    return places


def _distances(rows_NP: np.ndarray, squares_N: np.ndarray, centres_GP: np.ndarray) -> np.ndarray:
    """Squared, float64 [N, G]."""
    products_NG = (rows_NP @ centres_GP.T).astype(np.float64)
    distances_NG: np.ndarray = np.maximum(squares_N[:, None] - 2 * products_NG + np.square(centres_GP).sum(1), 0)
    return distances_NG


def _unit(rows: np.ndarray) -> np.ndarray:
    normed: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(rows.dtype).tiny)
    return normed


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
