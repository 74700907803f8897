"""Importance on text clusters (LLaMA-MoE, arXiv 2406.16554, section 3.1): each expert takes what its texts need.

Expert e belongs to text cluster e; neuron n matters to it by v_e[n] = sum over the cluster's tokens of |h_n dL/dh_n|
(tasks/partition/gradients.py). `sharing` says what happens to a neuron that several experts want:

    none    greedy matching: repeatedly the highest score among neurons not taken and experts not full
    inner   Sharing-Inner: every expert its best neurons, whoever else has them
    inter   Sharing-Inter: what most experts want goes to the shared experts, the rest as in `none`

Shapes: N neurons, E routed experts, S shared ones, F neurons per expert.
"""

from __future__ import annotations

import numpy as np

from tasks import settings
from tasks.partition import assignment
from tasks.partition.layer import Layer, Sizes
from tasks.partition.methods import method


@method("importance", needs="gradients")
def split(layer: Layer, sizes: Sizes, options: settings.Partition) -> np.ndarray:
    """int32 [S + E, F], shared experts first, sorted within.

    Raises:
        ValueError: the layer has no importance, or not one row per expert.
    """
    score_EN = scores(layer, rows=sizes.experts)
    if options.sharing == "inner":
        best_EF = np.argsort(-score_EN, axis=1, kind="stable")[:, : sizes.size]
        return np.sort(best_EF, axis=1).astype(np.int32)
    shared_M = wanted(score_EN, count=sizes.shared * sizes.size, size=sizes.size)
    rest = np.setdiff1d(np.arange(sizes.width), shared_M)
    routed_EF = rest[assignment.members(greedy(score_EN[:, rest], size=sizes.size), size=sizes.size)]
    shared_SF = np.sort(shared_M.reshape(sizes.shared, sizes.size), axis=1)
    return np.concatenate([shared_SF, routed_EF]).astype(np.int32)


def scores(layer: Layer, *, rows: int | None = None) -> np.ndarray:
    """The layer's importance, float64 [C, N]. Raises ValueError if there is none, or C is not `rows`."""
    if layer.importance_CN is None:
        raise ValueError(f"layer {layer.number}: no importance of its neurons, which this method needs")
    score_CN = layer.importance_CN.double().cpu().numpy()
    if rows is not None and len(score_CN) != rows:
        raise ValueError(f"layer {layer.number}: importance on {len(score_CN)} text clusters for {rows} experts")
    return score_CN


def wanted(score_EN: np.ndarray, *, count: int, size: int) -> np.ndarray:
    """The `count` neurons that most experts want, int64, in the order they are taken.

    In rounds, each expert names its best `size` neurons that are left; those that the most experts named are taken,
    among them the higher score summed over experts first (the original code goes by index), then the lower index.
    """
    by_score = np.argsort(-score_EN.sum(0), kind="stable")
    ranking_EN = np.argsort(-score_EN, axis=1, kind="stable")
    taken = np.zeros(0, dtype=np.int64)
    while len(taken) < count:
        left_EN = ranking_EN[~np.isin(ranking_EN, taken)].reshape(len(ranking_EN), -1)
        named_N = np.bincount(left_EN[:, :size].reshape(-1), minlength=score_EN.shape[1])
        most = by_score[named_N[by_score] == named_N.max()]
        taken = np.concatenate([taken, most[: count - len(taken)]])
    return taken


def greedy(score_EN: np.ndarray, *, size: int) -> np.ndarray:
    """Give the highest score left to its expert until each has `size` neurons: expert of each neuron, int64 [N].

    Equal scores go to the lower expert, then the lower neuron. As long as no expert fills up, every neuron goes to the
    open expert that scores it highest; so there is one step per expert that fills up, not one per score.
    """
    experts, neurons = score_EN.shape
    rank_EN = np.empty((experts, neurons), dtype=np.int64)
    rank_EN.flat[np.argsort(-score_EN, axis=None, kind="stable")] = np.arange(score_EN.size)
    free_E, expert_N = np.full(experts, size), np.full(neurons, -1)
    while len(waiting := np.flatnonzero(expert_N < 0)):
        open_EW = np.where(free_E[:, None] > 0, rank_EN[:, waiting], score_EN.size)
        wish, turn = open_EW.argmin(0), open_EW.min(0).argsort()
        count_WE = np.cumsum(np.eye(experts, dtype=np.int64)[wish[turn]], axis=0)
        full = (count_WE >= free_E) & (free_E > 0)
        until = int(full.any(1).argmax()) + 1
        expert_N[waiting[turn[:until]]] = wish[turn[:until]]
        free_E = free_E - count_WE[until - 1]
    return expert_N
