"""Experts of the neurons that one cluster of tokens uses, whoever else uses them; the clusters are the router's own.

A token passes one routed expert, which may be as wide as the active part of the FFN allows. As in LLaMA-MoE's
Sharing-Inner (arXiv 2406.16554, section 3.1) every expert takes its best neurons, and a neuron may be in several
experts or in none. There the clusters are of texts, and the router is trained later. Here they are of tokens, and are
what a linear router makes of them: clusters and experts take turns, as in k-means. Each expert takes the neurons with
the largest energy on its tokens; a linear router is fitted to the share of a token's energy that each expert holds;
each token goes to the expert with the highest score.

The neurons with the largest energy over all tokens are shared.

Shapes: T tokens, D hidden, N neurons, M neurons that are not shared, E routed experts, F neurons per expert.
"""

from __future__ import annotations

import numpy as np
import torch

from tasks import settings
from tasks.partition import router_init
from tasks.partition.layer import Layer, Sizes
from tasks.partition.methods import method

TURNS = 8
"""Of experts and router."""
_TOKENS = 16384
"""At most, on which the clusters are made: the energies of all neurons on them are in memory."""
_START_ROUNDS = 6
_PRIOR = 32
"""Tokens of mean energy that each expert counts besides its own, for the sake of small clusters."""


@method("token_clusters", needs="activations")
def split(layer: Layer, sizes: Sizes, options: settings.Partition) -> np.ndarray:
    """int32 [S + E, F], shared experts first, the most active neurons first among them; sorted within."""
    order_N = layer.energy_N.argsort(descending=True, stable=True)
    shared_N, rest_M = order_N[: sizes.shared * sizes.size], order_N[sizes.shared * sizes.size :].sort().values
    generator = np.random.default_rng(options.seed + layer.number)
    some = torch.from_numpy(np.sort(generator.permutation(len(layer.inputs))[:_TOKENS])).to(rest_M.device)
    x_TD, energy_TM = layer.inputs[some], _energies(layer, rest_M, tokens=some)
    weight_T = energy_TM.sum(1)
    cluster_T = _first_clusters(layer, rest_M, x_TD, weight_T, count=sizes.experts, generator=generator)
    weighted_TD = x_TD * weight_T[:, None]
    moments_DD = weighted_TD.T @ x_TD
    moments_DD.diagonal().add_(router_init.RIDGE * moments_DD.diagonal().mean().clamp_min(1e-30))
    prior_M = energy_TM.mean(0) * _PRIOR
    for _ in range(TURNS):
        wanted_EM = prior_M.repeat(sizes.experts, 1).index_add_(0, cluster_T, energy_TM)
        place_EF = wanted_EM.argsort(dim=1, descending=True, stable=True)[:, : sizes.size]
        member_EM = torch.zeros_like(wanted_EM).scatter_(1, place_EF, 1.0)
        share_TE = energy_TM @ member_EM.T / weight_T.clamp_min(1e-30)[:, None]
        target_DE = weighted_TD.T @ (share_TE - share_TE.mean(1, keepdim=True))
        router_DE = torch.linalg.solve(moments_DD, target_DE)
        cluster_T = (x_TD @ router_DE).argmax(1)
    routed_EF = rest_M[place_EF]
    experts_EF = torch.cat([shared_N.view(sizes.shared, sizes.size), routed_EF]).sort(dim=1).values
    return experts_EF.cpu().numpy().astype(np.int32)


def _energies(layer: Layer, neurons_M: torch.Tensor, *, tokens: torch.Tensor) -> torch.Tensor:
    """What each neuron contributes to each token, (h * norm of its down column)^2, by the token's weight: [T, M]."""
    norm_M = layer.down_DN.norm(dim=0)[neurons_M]
    parts = [
        (h_TN[:, neurons_M] * norm_M).square_() * weight_T[:, None]
        for (_, h_TN), weight_T in zip(layer.chunks(tokens), layer.weights(tokens), strict=True)
    ]
    return torch.cat(parts)


def _first_clusters(
    layer: Layer,
    neurons_M: torch.Tensor,
    x_TD: torch.Tensor,
    weight_T: torch.Tensor,
    *,
    count: int,
    generator: np.random.Generator,
) -> torch.Tensor:
    """k-means of the tokens by the log energies that a linear router of single neurons gives them: int64 [T]."""
    router_MD = router_init.regression(layer, neurons_M[:, None].cpu().numpy())
    score_TM = x_TD @ router_MD.T
    root_T = weight_T.sqrt()
    chance_T = root_T.double().cpu().numpy()
    first = generator.choice(len(chance_T), size=count, p=chance_T / chance_T.sum())
    centre_EM = score_TM[torch.from_numpy(first).to(score_TM.device)]
    for _ in range(_START_ROUNDS):
        cluster_T = (score_TM @ centre_EM.T - centre_EM.square().sum(1) / 2).argmax(1)
        total_E = score_TM.new_zeros(count).index_add_(0, cluster_T, root_T)
        sum_EM = torch.zeros_like(centre_EM).index_add_(0, cluster_T, score_TM * root_T[:, None])
        centre_EM = torch.where(total_E[:, None] > 0, sum_EM / total_E.clamp_min(1e-30)[:, None], centre_EM)
    return cluster_T
