"""How a router starts: four ways, each a linear map from what the FFN reads to a logit per expert.

    random       N(0, 0.02), as LLaMA-MoE starts its gates
    centroid     the mean gate row of an expert's neurons (MoEfication's first gate layer, arXiv 2110.01786)
    analytical   the gate row of the neuron that stands for its expert best (CMoE, arXiv 2502.04416, section 4.3)
    regression   ridge regression to each expert's log energy on calibration tokens

Shapes: T tokens, D hidden, N neurons, E routed experts, F neurons per expert, K experts per token.
"""

from __future__ import annotations

import numpy as np
import torch

from tasks.partition.layer import Layer

INIT_STD = 0.02
"""Standard deviation of a random router's weights (LLaMA-MoE's gates)."""
RIDGE = 0.01
"""Ridge penalty, as a share of the mean diagonal of the inputs' second moments."""
FLOOR = 0.5
"""Added to an energy before its logarithm, as a share of the mean energy: how small a small one is does not matter."""


def start(name: str, layer: Layer, routed_EF: np.ndarray, *, seed: int) -> torch.Tensor:
    """Router weights [E, D] of one layer, not yet scaled.

    Args:
        name: random, centroid, analytical or regression; the last two need calibration tokens.
        routed_EF: neurons of the routed experts.
    """
    if name == "random":
        return random_weights(len(routed_EF), layer.gate_ND.shape[1], seed=seed, layer=layer.number).to(layer.gate_ND)
    if name == "centroid":
        return layer.gate_ND[torch.from_numpy(routed_EF).long()].mean(1)
    if name == "analytical":
        return layer.gate_ND[representatives(layer, routed_EF)]
    return regression(layer, routed_EF)


def random_weights(experts: int, hidden: int, *, seed: int, layer: int) -> torch.Tensor:
    """N(0, 0.02) as LLaMA-MoE starts its gates: float32 [E, D]."""
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    return torch.randn(experts, hidden, generator=generator) * INIT_STD


def energies(h_TN: torch.Tensor, down_DN: torch.Tensor, routed_EF: np.ndarray) -> torch.Tensor:
    """What each expert contributes to each token: the sum over its neurons of (h * norm of its down column)^2."""
    place_EF = torch.from_numpy(routed_EF).long().to(h_TN.device)
    norm_N = down_DN.norm(dim=0)
    if place_EF.shape[1] == 1:
        place_E = place_EF[:, 0]
        energy_TE: torch.Tensor = (h_TN.index_select(1, place_E) * norm_N[place_E]).square_()
    else:
        member_EN = norm_N.new_zeros(len(place_EF), len(norm_N)).scatter_(1, place_EF, 1.0)
        energy_TE = h_TN.square() @ (member_EN * norm_N.square()).T
    return energy_TE


def representatives(layer: Layer, routed_EF: np.ndarray) -> torch.Tensor:
    """For each expert the neuron whose energy goes with the expert's over the calibration tokens, int64 [E]."""
    norm_N = layer.down_DN.norm(dim=0)
    place_EF = torch.from_numpy(routed_EF).long().to(norm_N.device)
    product_EF = torch.zeros(routed_EF.shape, device=norm_N.device)
    square_N = torch.zeros_like(norm_N)
    for (_, h_TN), weight_T in zip(layer.chunks(), layer.weights(), strict=True):
        size_TN = (h_TN * norm_N).abs() * weight_T.sqrt()[:, None]
        expert_TE = size_TN[:, place_EF.reshape(-1)].unflatten(1, routed_EF.shape).sum(2)
        product_EF += (expert_TE.T @ size_TN).gather(1, place_EF)
        square_N += size_TN.square().sum(0)
    cosine_EF = product_EF / square_N[place_EF].sqrt().clamp_min(1e-12)
    return place_EF.gather(1, cosine_EF.argmax(1, keepdim=True)).squeeze(1)


def regression(layer: Layer, routed_EF: np.ndarray, *, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Ridge regression from the FFN's input to each expert's log energy, [E, D].

    The target is centred over experts, since only the order within a token matters; the stock router classes have no
    bias, so neither has this (one changes nothing: some direction of the inputs is all but constant). Energies are
    relative to the hidden state (`Layer.weight_T`), and tokens weigh by the root of their mean energy: where the FFN
    does much, a wrong choice costs much. What else was tried, with figures: docs/partition.md.

    Args:
        tokens: indices of the calibration tokens to use; all if absent.
    """
    hidden = layer.gate_ND.shape[1]
    moments_DD = layer.gate_ND.new_zeros(hidden, hidden)
    target_DE = layer.gate_ND.new_zeros(hidden, len(routed_EF))
    place_EF = torch.from_numpy(routed_EF).long().to(layer.gate_ND.device)
    floor = FLOOR * layer.energy_N[place_EF].sum(1).mean() + 1e-12
    for (x_TD, h_TN), weight_T in zip(layer.chunks(tokens), layer.weights(tokens), strict=True):
        energy_TE = energies(h_TN, layer.down_DN, routed_EF).mul_(weight_T[:, None])
        weighted_TD = x_TD * energy_TE.mean(1, keepdim=True).sqrt()
        log_TE = energy_TE.add_(floor).log_()
        moments_DD.addmm_(weighted_TD.T, x_TD)
        target_DE.addmm_(weighted_TD.T, log_TE.sub_(log_TE.mean(1, keepdim=True)))
    moments_DD.diagonal().add_(RIDGE * moments_DD.diagonal().mean().clamp_min(1e-30))
    solution_DE: torch.Tensor = torch.linalg.solve(moments_DD, target_DE)
    return solution_DE.T.contiguous()


def chosen(
    weight_ED: torch.Tensor, x_TD: torch.Tensor, *, top_k: int, normalised: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [T, K] of the chosen experts, best first, and their softmax weights [T, K].

    The weights sum to 1 over the chosen experts, or if not `normalised` over all.
    """
    logits_TE = x_TD @ weight_ED.T
    values, index = logits_TE.topk(top_k, dim=1)
    return index, values.softmax(1) if normalised else logits_TE.softmax(1).gather(1, index)
