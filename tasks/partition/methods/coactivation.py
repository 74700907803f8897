"""Co-activation graph (MoEfication, arXiv 2110.01786, section 3.2): neurons that fire together form an expert.

The weight of the edge between two neurons is the sum over calibration tokens of |h_i| |h_j|. The graph is cut into E
equal parts with little weight between them: a spectral start (balanced k-means on the leading subspace of the
normalised graph), then swaps of two neurons for as long as one lowers the cut (Kernighan-Lin).

Shapes: N neurons, E experts, F neurons per expert. The graph is float32 [N, N]: 485 MB at N = 11008.
"""

from __future__ import annotations

import numpy as np
import torch

from tasks import settings
from tasks.partition import assignment
from tasks.partition.layer import Layer, Sizes
from tasks.partition.methods import method

_ITERATIONS = 30
"""Of the subspace iteration; it only has to give a start."""
_CANDIDATES = 64
"""Neurons of each side that a swap is chosen from: those that gain most, before their common edge is counted."""


@method("coactivation", needs="activations")
def split(layer: Layer, sizes: Sizes, options: settings.Partition) -> np.ndarray:
    """Every expert a part of the co-activation graph, sorted within: int32 [E, F]."""
    generator = np.random.default_rng([options.seed, layer.number])
    return assignment.members(cut(graph(layer), parts=sizes.experts, generator=generator), size=sizes.size)


def graph(layer: Layer) -> np.ndarray:
    """Sum over the calibration tokens of |h_i| |h_j|, float32 [N, N], zero on the diagonal."""
    neurons = len(layer.gate_ND)
    weight_NN = torch.zeros(neurons, neurons, device=layer.gate_ND.device)
    for _, h_TN in layer.chunks():
        active_TN = h_TN.abs()
        weight_NN.addmm_(active_TN.T, active_TN)
    return weight_NN.fill_diagonal_(0).cpu().numpy()


def cut(weight_NN: np.ndarray, *, parts: int, generator: np.random.Generator) -> np.ndarray:
    """Cut a symmetric graph without negative weights into equal parts: part of each node, int64 [N]."""
    if parts == 1:
        return np.zeros(len(weight_NN), dtype=np.int64)
    sizes_G = np.full(parts, len(weight_NN) // parts)
    start_N = assignment.kmeans(
        _subspace(weight_NN, count=parts, generator=generator), sizes_G=sizes_G, generator=generator, cosine=True
    )
    return _swapped(weight_NN, start_N, parts=parts)


def _subspace(weight_NN: np.ndarray, *, count: int, generator: np.random.Generator) -> np.ndarray:
    """Basis of the leading eigenvectors' space of D^-1/2 A D^-1/2, [N, count]; angles between rows need no more."""
    root_N1 = 1 / np.sqrt(np.maximum(weight_NN.sum(1, keepdims=True), np.finfo(np.float32).tiny))
    basis_NE = generator.standard_normal((len(weight_NN), count), dtype=np.float32)
    for _ in range(_ITERATIONS):
        basis_NE = np.linalg.qr(root_N1 * (weight_NN @ (root_N1 * basis_NE)))[0]
    return basis_NE


def _swapped(weight_NN: np.ndarray, part_N: np.ndarray, *, parts: int) -> np.ndarray:
    """Swap pairs of nodes, the best of each two parts first, until no swap lowers the cut."""
    part_N = part_N.copy()
    link_NE = (weight_NN @ np.eye(parts, dtype=np.float32)[part_N]).astype(np.float64)  # to each part
    least = 1e-9 * link_NE.mean()  # a smaller gain is rounding
    improved = True
    while improved:
        improved = False
        for a in range(parts):
            for b in range(a + 1, parts):
                while swap := _best_swap(weight_NN, link_NE, part_N, a=a, b=b, least=least):
                    i, j = swap
                    part_N[i], part_N[j] = b, a
                    moved_N = weight_NN[j] - weight_NN[i]
                    link_NE[:, a] += moved_N
                    link_NE[:, b] -= moved_N
                    improved = True
    return part_N


def _best_swap(
    weight_NN: np.ndarray, link_NE: np.ndarray, part_N: np.ndarray, *, a: int, b: int, least: float
) -> tuple[int, int] | None:
    """The nodes of parts a and b whose swap lowers the cut most; None if by no more than `least`."""
    sides, gains = [], []
    for own, other in ((a, b), (b, a)):
        nodes = np.flatnonzero(part_N == own)
        gain = link_NE[nodes, other] - link_NE[nodes, own]
        best = np.argsort(-gain, kind="stable")[:_CANDIDATES]
        sides.append(nodes[best])
        gains.append(gain[best])
    total = gains[0][:, None] + gains[1][None] - 2 * weight_NN[np.ix_(*sides)]
    i, j = np.unravel_index(total.argmax(), total.shape)
    return (int(sides[0][i]), int(sides[1][j])) if total[i, j] > least else None
