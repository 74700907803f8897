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
    cluster_T = _first_clusters(layer, rest_M, weight_T, tokens=some, count=sizes.experts, generator=generator)
    weighted_TD = x_TD * weight_T[:, None]
    moments_DD = weighted_TD.T @ x_TD
    moments_DD.diagonal().add_(router_init.RIDGE * moments_DD.diagonal().mean().clamp_min(1e-30))
    factors = torch.linalg.lu_factor(moments_DD)
    prior_M = energy_TM.mean(0) * _PRIOR
    for _ in range(TURNS):
        wanted_EM = prior_M.repeat(sizes.experts, 1).index_add_(0, cluster_T, energy_TM)
        place_EF = wanted_EM.argsort(dim=1, descending=True, stable=True)[:, : sizes.size]
        member_EM = torch.zeros_like(wanted_EM).scatter_(1, place_EF, 1.0)
        share_TE = energy_TM @ member_EM.T / weight_T.clamp_min(1e-30)[:, None]
        target_DE = weighted_TD.T @ (share_TE - share_TE.mean(1, keepdim=True))
        router_DE = torch.linalg.lu_solve(*factors, target_DE)
        cluster_T = (x_TD @ router_DE).argmax(1)
    routed_EF = rest_M[place_EF]
    experts_EF = torch.cat([shared_N.view(sizes.shared, sizes.size), routed_EF]).sort(dim=1).values
    return experts_EF.cpu().numpy().astype(np.int32)


def _energies(layer: Layer, neurons_M: torch.Tensor, *, tokens: torch.Tensor) -> torch.Tensor:
    """What each neuron contributes to each token, (h * norm of its down column)^2, by the token's weight: [T, M]."""
    norm_M = layer.down_DN.norm(dim=0)[neurons_M]
    parts = [
        (h_TN.index_select(1, neurons_M) * norm_M).square_().mul_(weight_T[:, None])
        for (_, h_TN), weight_T in zip(layer.chunks(tokens), layer.weights(tokens), strict=True)
    ]
    return torch.cat(parts)


def _first_clusters(
    layer: Layer,
    neurons_M: torch.Tensor,
    weight_T: torch.Tensor,
    *,
    tokens: torch.Tensor,
    count: int,
    generator: np.random.Generator,
) -> torch.Tensor:
    """k-means of the tokens by the log energies that a linear router of single neurons gives them: int64 [T].

    These scores, router times x, are never formed: products with them and sums of them are taken of x.
    """
    router_MD = router_init.regression(layer, neurons_M[:, None].cpu().numpy(), tokens=tokens)
    x_TD, root_T = layer.inputs[tokens], weight_T.sqrt()
    chance_T = root_T.double().cpu().numpy()
    first = generator.choice(len(chance_T), size=count, p=chance_T / chance_T.sum())
    centre_EM = x_TD[torch.from_numpy(first).to(x_TD.device)] @ router_MD.T
    weighted_TD = x_TD * root_T[:, None]
    for _ in range(_START_ROUNDS):
        cluster_T = (x_TD @ (router_MD.T @ centre_EM.T) - centre_EM.square().sum(1) / 2).argmax(1)
        total_E = root_T.new_zeros(count).index_add_(0, cluster_T, root_T)
        sum_ED = x_TD.new_zeros(count, x_TD.shape[1]).index_add_(0, cluster_T, weighted_TD)
        mean_EM = (sum_ED / total_E.clamp_min(1e-30)[:, None]) @ router_MD.T
        centre_EM = torch.where(total_E[:, None] > 0, mean_EM, centre_EM)
    return cluster_T
