"""Activation-based split with shared experts and a fitted router, after CMoE (arXiv 2502.04416).

What CMoE does once, this does in turns: the router says which tokens drop an expert, and the neurons then move to
where they are dropped with the least harm, into the shared experts if nothing else is good enough.

Shapes: T tokens, D hidden, N neurons of the dense FFN, E routed experts, G = E + 1 groups, the last being all shared
neurons.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from tasks.partition import assignment, router

ROUNDS = 2
"""Turns of router and assignment; most of the gain comes with the first, and a fourth gives nothing."""
_ROUND_TOKENS = 8192
_DAMPING = 0.5
"""Share of the cross terms that counts: all neurons move at once, and each for itself would overshoot."""
_KMEANS_ROUNDS = 4
_KMEANS_TOKENS = 4096


def split_layer(
    x_TD: torch.Tensor,
    h_TN: torch.Tensor,
    down_DN: torch.Tensor,
    *,
    experts: int,
    shared_experts: int,
    top_k: int,
    seed: int,
) -> tuple[np.ndarray, torch.Tensor]:
    """Cut one FFN into experts.

    Args:
        x_TD: the FFN's inputs on calibration tokens.
        h_TN: silu(gate) * up on the same tokens.
        down_DN: the FFN's down_proj weight.
        experts: E; `shared_experts` more are always on. Together they divide N.
        top_k: routed experts per token.
        seed: of the first clusters, and of the tokens that the rounds look at.

    Returns:
        int32 [shared_experts + E, size] neuron indices, shared first, and the router's weight [E, D], not scaled.
    """
    neurons = h_TN.shape[1]
    size = neurons // (experts + shared_experts)
    sizes_G = np.array([size] * experts + [size * shared_experts])
    energy_TN = (h_TN * down_DN.norm(dim=0)).square()
    generator = np.random.default_rng(seed)
    group_N = _first_groups(energy_TN, sizes_G=sizes_G, generator=generator)
    some = np.sort(generator.permutation(len(x_TD))[:_ROUND_TOKENS])
    some_x, some_h, some_energy = x_TD[some], h_TN[some], energy_TN[some]
    for _ in range(ROUNDS):
        weight_ED = router.fit(some_x, _per_expert(some_energy, group_N, experts))
        chosen_TE = _chosen(weight_ED, some_x, top_k)
        cost_NG = _costs(some_h, some_energy, down_DN, group_N=group_N, chosen_TE=chosen_TE)
        group_N = assignment.balanced(cost_NG.double().cpu().numpy(), sizes_G=sizes_G)
    weight_ED = router.fit(x_TD, _per_expert(energy_TN, group_N, experts))
    shared = np.flatnonzero(group_N == experts)
    # The most active first, so that whoever keeps fewer shared experts keeps the best.
    shared = shared[np.argsort(-energy_TN.mean(0).cpu().numpy()[shared], kind="stable")]
    routed = [np.flatnonzero(group_N == expert) for expert in range(experts)]
    return np.concatenate([shared, *routed]).astype(np.int32).reshape(-1, size), weight_ED


def _first_groups(energy_TN: torch.Tensor, *, sizes_G: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Shared: the neurons that contribute most. The rest: balanced spherical k-means on when they contribute."""
    experts, neurons = len(sizes_G) - 1, energy_TN.shape[1]
    order = energy_TN.mean(0).argsort(descending=True, stable=True).cpu().numpy()
    group_N = np.full(neurons, experts)
    routed = np.sort(order[sizes_G[-1] :])
    tokens = generator.permutation(len(energy_TN))[:_KMEANS_TOKENS]
    patterns = energy_TN[torch.from_numpy(np.sort(tokens)).to(energy_TN.device)][:, routed].pow(0.25).T
    patterns = F.normalize(patterns, dim=1)
    centres = patterns[generator.choice(len(routed), experts, replace=False)]
    for _ in range(_KMEANS_ROUNDS):
        likeness = (patterns @ centres.T).double().cpu().numpy()
        cluster = assignment.balanced(-likeness, sizes_G=sizes_G[:-1])
        sums = torch.zeros_like(centres).index_add_(0, torch.from_numpy(cluster).to(centres.device), patterns)
        centres = F.normalize(sums, dim=1)
    group_N[routed] = cluster
    return group_N


def _per_expert(energy_TN: torch.Tensor, group_N: np.ndarray, experts: int) -> torch.Tensor:
    """Sum the neurons' energies over each routed expert, [T, E]."""
    member_NE = F.one_hot(torch.from_numpy(group_N), experts + 1)[:, :experts].to(energy_TN)
    return energy_TN @ member_NE


def _chosen(weight_ED: torch.Tensor, x_TD: torch.Tensor, top_k: int) -> torch.Tensor:
    """1 where a token passes an expert, [T, E]."""
    index_TK, _ = router.chosen(weight_ED, x_TD, top_k=top_k)
    return torch.zeros(len(x_TD), len(weight_ED), device=x_TD.device).scatter_(1, index_TK, 1.0)


def _costs(
    h_TN: torch.Tensor, energy_TN: torch.Tensor, down_DN: torch.Tensor, *, group_N: np.ndarray, chosen_TE: torch.Tensor
) -> torch.Tensor:
    """Growth of the squared output error if neuron n, and it alone, were to stand in group g, [N, G].

    With r(t) the output that token t loses now and d the tokens that drop n now, dropping n at t adds
    |h w|^2 + 2 h w . (r - d h w): its own energy, and how it adds to or cancels what is lost already.
    """
    kept_TG = torch.cat([chosen_TE, torch.ones_like(chosen_TE[:, :1])], dim=1)
    dropped_TN = 1 - kept_TG[:, torch.from_numpy(group_N).to(kept_TG.device)]
    lost_TD = (h_TN * dropped_TN) @ down_DN.T
    growth_TN = energy_TN + 2 * _DAMPING * (h_TN * (lost_TD @ down_DN) - dropped_TN * energy_TN)
    return growth_TN.T @ (1 - kept_TG)
