"""The hard concrete distribution (arXiv 1712.01312), with the constants of Sheared LLaMA (arXiv 2310.06694).

A mask z is 0 with a probability of its own, 1 with another, and between them else:

    s = sigmoid((ln u - ln(1 - u) + log_alpha) / BETA),  u ~ U(0, 1)
    z = clip(s (HIGH - LOW) + LOW, 0, 1)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOW, HIGH, BETA = -0.1, 1.1, 2 / 3
SMALLEST, LARGEST = -7.0, math.log(100)
"""Limits of log_alpha: a mask at the lower one is 0 in 99.5 % of draws, at the upper one in 0.2 %."""
_EDGE = 1e-6
_SHARPER = 0.8


def sample(log_alpha: Tensor) -> Tensor:
    """Draw masks from torch's global generator; gradients pass to log_alpha."""
    u = torch.empty_like(log_alpha).uniform_(_EDGE, 1 - _EDGE)
    s = torch.sigmoid((u.log() - (-u).log1p() + log_alpha) / BETA)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def absent(log_alpha: Tensor) -> Tensor:
    """The probability that a mask is 0."""
    return torch.sigmoid(BETA * math.log(-LOW / HIGH) - log_alpha)


def factor(log_alpha: Tensor) -> Tensor:
    """The value that stands for a mask where nothing is drawn."""
    return torch.sigmoid(log_alpha / BETA * _SHARPER)


def bounded(log_alpha: Tensor) -> Tensor:
    """log_alpha within its limits. A gradient that would lead out of them is dropped, so that it can come back."""
    limited: Tensor = _Bounded.apply(log_alpha)  # type: ignore[no-untyped-call]
    return limited


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor) -> Tensor:
        ctx.save_for_backward(log_alpha)
        return log_alpha.clamp(SMALLEST, LARGEST)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (log_alpha,) = ctx.saved_tensors
        (gradient,) = gradients
        out = ((log_alpha >= LARGEST) & (gradient < 0)) | ((log_alpha <= SMALLEST) & (gradient > 0))
        return gradient.masked_fill(out, 0.0)
