"""How alike two experts are once their neurons are matched (arXiv 2406.18219, section 3.2).

Shapes: F neurons of an expert, D hidden.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.plugins.analysis import cosine
from tasks.plugins.analysis.interface import Analysis, Figures
from tasks.plugins.analysis.layer import MATRICES, Layer

PAIRS = 6
"""Pairs of experts of each layer, spread evenly over all. A pair takes F^3 operations."""


def measure(layer: Layer) -> Figures:
    """Gain of cosine by matching the neurons of each matrix, and Kendall's tau of the match and the stored order."""
    names = [f"shared {e}" for e in range(layer.shared)] + [str(e) for e in range(layer.experts)]
    pairs = list(combinations(range(len(names)), 2))
    chosen = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, min(PAIRS, len(pairs))).astype(int))]
    curves: dict[str, dict[str, float | None]] = {"gain of cosine by matching": {}, "Kendall's tau": {}}
    detail: dict[str, Any] = {"pairs": [[names[a], names[b]] for a, b in chosen], "after": {}, "gain": {}, "tau": {}}
    for name in MATRICES:
        weights_XFD = layer.matrix(name)
        rows = [match(weights_XFD[a], weights_XFD[b]) for a, b in chosen]
        before, after, tau = (np.array(column) for column in zip(*rows, strict=True))
        detail["after"][name], detail["gain"][name], detail["tau"][name] = after, after - before, tau
        curves["gain of cosine by matching"][name] = float((after - before).mean())
        curves["Kendall's tau"][name] = float(tau.mean())
    return Figures(curves=curves, detail=detail)


def match(first_FD: Tensor, second_FD: Tensor) -> tuple[float, float, float]:
    """Cosine of two matrices as they lie, and with the second's neurons in the order that fits the first's best; tau.

    The order has the largest sum of the neurons' cosines. tau is 1 where it is the order in which they are stored.
    """
    from scipy.stats import kendalltau

    order = best_order(first_FD, second_FD)
    before = cosine.of_pairs(first_FD[None], second_FD[None])
    after = cosine.of_pairs(first_FD[None], second_FD[torch.from_numpy(order).to(second_FD.device)][None])
    return float(before[0]), float(after[0]), float(kendalltau(order, np.arange(len(order))).statistic)


def best_order(first_FD: Tensor, second_FD: Tensor) -> np.ndarray:
    """For each neuron of the first expert the one of the second that it is matched with, int [F]."""
    from scipy.optimize import linear_sum_assignment

    alike_FF = F.normalize(first_FD.double(), dim=1) @ F.normalize(second_FD.double(), dim=1).T
    order: np.ndarray = linear_sum_assignment(alike_FF.cpu().numpy(), maximize=True)[1]
    return order


ANALYSIS = Analysis(
    title="Similarity after matching the neurons",
    note=f"The neurons of one expert are reordered to fit another's (linear assignment on their cosines), {PAIRS} "
    "pairs of a layer, shared experts among them. Gain: cosine of the whole matrices after, minus before. Kendall's "
    "tau of that order: 1 where the stored order is the best one, about 0 where it has nothing to do with it.",
    needs="weights",
    measure=measure,
)
