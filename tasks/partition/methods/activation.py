"""Experts of neurons that a linear router can choose together, with shared experts as in CMoE (arXiv 2502.04416).

A linear router is first fitted to every neuron for itself. Neurons that it scores alike become an expert, so that
choosing experts loses little against choosing neurons. Then router and experts take turns: the router says which
tokens drop an expert, and the neurons move to where they are dropped with the least harm, into the shared experts if
nothing else is good enough.

Shapes: T tokens, D hidden, N neurons of the dense FFN, E routed experts, G = E + 1 groups, the last being all shared
neurons.
"""

from __future__ import annotations

import numpy as np
import torch

from tasks import settings
from tasks.partition import assignment, router_init
from tasks.partition.layer import Layer, Sizes
from tasks.partition.methods import method

TURNS = 1
"""Of router and experts; a second gains nothing."""
_TURN_TOKENS = 8192
_DAMPING = 0.5
"""Share of the cross terms that counts: all neurons move at once, and each for itself would overshoot."""
_KMEANS_ROUNDS = 5


@method("activation", needs="activations")
def split(layer: Layer, sizes: Sizes, options: settings.Partition) -> np.ndarray:
    """int32 [shared + E, size]; the shared experts come first, the most active neurons first among them."""
    sizes_G = np.array([sizes.size] * sizes.experts + [sizes.size * sizes.shared])
    generator = np.random.default_rng(options.seed + layer.number)
    energy_N = layer.energy_N.cpu().numpy()
    group_N = _first_groups(layer, energy_N, sizes_G=sizes_G, generator=generator)
    some = torch.from_numpy(np.sort(generator.permutation(len(layer.inputs))[:_TURN_TOKENS]))
    for _ in range(TURNS if sizes.experts > sizes.top_k else 0):
        weight_ED = router_init.regression(layer, _members(group_N, sizes), tokens=some)
        cost_NG = _costs(layer, weight_ED, group_N=group_N, top_k=sizes.top_k, tokens=some)
        group_N = assignment.balanced(cost_NG.double().cpu().numpy(), sizes_G=sizes_G)
    shared = np.flatnonzero(group_N == sizes.experts)
    # The most active first, so that whoever keeps fewer shared experts keeps the best.
    shared = shared[np.argsort(-energy_N[shared], kind="stable")]
    return np.concatenate([shared.reshape(-1, sizes.size), _members(group_N, sizes)]).astype(np.int32)


def _members(group_N: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Neurons of the routed experts, ascending within each: int64 [E, size]."""
    order = np.argsort(group_N, kind="stable")
    return order[: sizes.experts * sizes.size].reshape(sizes.experts, sizes.size)


def _first_groups(
    layer: Layer, energy_N: np.ndarray, *, sizes_G: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Shared: the neurons that contribute most. The rest: balanced k-means on their scores by a router of neurons.

    With the inputs' second moments C C', the distance of two rows of the router times C is that of their scores over
    the calibration tokens.
    """
    x_TD, experts = layer.inputs, len(sizes_G) - 1
    group_N = np.full(len(energy_N), experts)
    routed = np.sort(np.argsort(-energy_N, kind="stable")[sizes_G[-1] :])
    moments_DD = x_TD.T @ x_TD / len(x_TD)
    moments_DD.diagonal().add_(1e-6 * moments_DD.diagonal().mean())
    rows_ND = router_init.regression(layer, routed[:, None]) @ torch.linalg.cholesky(moments_DD)
    group_N[routed] = assignment.kmeans(
        rows_ND.cpu().numpy(), sizes_G=sizes_G[:-1], generator=generator, rounds=_KMEANS_ROUNDS
    )
    return group_N


def _costs(
    layer: Layer, weight_ED: torch.Tensor, *, group_N: np.ndarray, top_k: int, tokens: torch.Tensor
) -> torch.Tensor:
    """Growth of the weighted squared output error if neuron n, and it alone, were to stand in group g, [N, G].

    With r(t) the output that token t loses now and d the tokens that drop n now, dropping n at t adds
    |h w|^2 + 2 h w . (r - d h w): its own energy, and how it adds to or cancels what is lost already.
    """
    square_N = layer.down_DN.square().sum(0)
    place_N = torch.from_numpy(group_N).to(square_N.device)
    cost_NG = torch.zeros(len(group_N), len(weight_ED) + 1, device=square_N.device)
    for (x_TD, h_TN), weight_T in zip(layer.chunks(tokens), layer.weights(tokens), strict=True):
        index_TK, _ = router_init.chosen(weight_ED, x_TD, top_k=top_k)
        dropped_TG = torch.ones(len(x_TD), len(weight_ED) + 1, device=x_TD.device)
        dropped_TG[:, -1] = 0
        dropped_TG.scatter_(1, index_TK, 0.0)
        dropped_TN = dropped_TG[:, place_N]
        energy_TN = h_TN.square() * square_N
        lost_TD = (h_TN * dropped_TN) @ layer.down_DN.T
        growth_TN = energy_TN + 2 * _DAMPING * (h_TN * (lost_TD @ layer.down_DN) - dropped_TN * energy_TN)
        cost_NG += (growth_TN * weight_T[:, None]).T @ dropped_TG
    return cost_NG
