"""Linear routers: a random one, and one fitted in closed form to what each expert contributes.

Shapes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import torch

INIT_STD = 0.02
"""Standard deviation of a random router's weights (LLaMA-MoE's gates)."""
RIDGE = 0.01
"""Ridge penalty, as a share of the mean diagonal of the inputs' second moments."""


def random_weights(experts: int, hidden: int, *, seed: int, layer: int) -> torch.Tensor:
    """N(0, 0.02) as LLaMA-MoE starts its gates: float32 [E, D]."""
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    return torch.randn(experts, hidden, generator=generator) * INIT_STD


def fit(x_TD: torch.Tensor, energy_TE: torch.Tensor) -> torch.Tensor:
    """Ridge regression from the FFN's input to each expert's log energy.

    The target is centred over experts, since only the order within a token matters; the stock router classes have no
    bias, so neither has this. Tokens weigh by the root of their mean energy: where the FFN does much, a wrong choice
    costs much. On held-out text this lost less than regressing the energy, its root or the top-K membership.

    Args:
        x_TD: what the FFN reads.
        energy_TE: sum over an expert's neurons of (h * norm of its down_proj column) squared.

    Returns:
        weights [E, D], not yet scaled.
    """
    log_TE = (energy_TE + 1e-8).log()
    target_TE = log_TE - log_TE.mean(1, keepdim=True)
    weight_T1 = energy_TE.mean(1, keepdim=True).sqrt()
    weighted_TD = x_TD * (weight_T1 / weight_T1.mean().clamp_min(1e-12))
    moments_DD = weighted_TD.T @ x_TD / len(x_TD)
    moments_DD.diagonal().add_(RIDGE * moments_DD.diagonal().mean())
    solution_DE: torch.Tensor = torch.linalg.solve(moments_DD, weighted_TD.T @ target_TE / len(x_TD))
    return solution_DE.T.contiguous()


def scaled(weight_ED: torch.Tensor, x_TD: torch.Tensor, *, std: float) -> torch.Tensor:
    """Centre over experts and scale so that the logits' standard deviation over tokens and experts is `std`.

    Neither changes which experts are chosen; the second sets how far the chosen ones' softmax weights lie from 1/K.
    """
    centred_ED = weight_ED - weight_ED.mean(0, keepdim=True)
    return centred_ED * (std / (x_TD @ centred_ED.T).std().clamp_min(1e-12))


def chosen(weight_ED: torch.Tensor, x_TD: torch.Tensor, *, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [T, K] of the chosen experts, and their softmax weights [T, K] that sum to 1."""
    values, index = (x_TD @ weight_ED.T).topk(top_k, dim=1)
    return index, values.softmax(1)
