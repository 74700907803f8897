"""Trains the weights of a converted FFN's neurons on the calibration tokens, by gradients.

Shapes: T tokens, D hidden, N neurons of the dense FFN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tasks.partition.layer import Layer, neurons

RATE = 0.01
"""Peak of the learning rates, as a share of each matrix's root mean square."""
_BATCH = 512  # tokens


@torch.enable_grad()
def fit(
    start: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    layer: Layer,
    target: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    passes: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Train gate [N, D], up [N, D] and down [D, N] so many times over the tokens, by the weighted squared error.

    Adam, batches of 512 tokens, cosine to 0. The rate of a matrix follows its size. The router's choices are given: no
    gradient reaches the router.

    Args:
        start: gate, up and down before; they stay as they are.
        target: from indices of tokens [T] to what each neuron's output is multiplied by, [T, N], and to what the FFN
            should give, [T, D].
        seed: of the order of the tokens.
    """
    weights = [weight.detach().clone().requires_grad_() for weight in start]
    peaks = [RATE * weight.detach().square().mean().sqrt().item() for weight in weights]
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": 0.0} for weight in weights], betas=(0.9, 0.95), fused=True
    )
    generator = torch.Generator().manual_seed(seed * 100_003 + layer.number)
    count = len(layer.inputs)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    steps = order.to(layer.inputs.device).split(_BATCH)
    weight_T = torch.cat(list(layer.weights()))
    for step, part in enumerate(steps):
        with torch.no_grad():
            coefficient_TN, target_TD = target(part)
        gate_ND, up_ND, down_DN = weights
        error_TD = (neurons(layer.inputs[part], gate_ND, up_ND) * coefficient_TN) @ down_DN.T - target_TD
        optimizer.zero_grad()
        (error_TD.square().sum(1) * weight_T[part]).mean().backward()
        share = min(1.0, 10 * (step + 1) / len(steps)) * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        optimizer.step()
    gate_ND, up_ND, down_DN = (weight.detach() for weight in weights)
    return gate_ND, up_ND, down_DN
