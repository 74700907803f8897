"""What every method sees of one dense FFN: its weights, and what passes through it on the calibration tokens.

Shapes: T tokens, D hidden, N neurons (FFN width), E routed experts, S shared experts, F neurons per expert, K routed
experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

CACHE_BYTES = 512 << 20
"""Neuron activations of one layer are kept up to this size, and computed anew in chunks above it."""
CHUNK = 2048  # tokens


def neurons(x_TD: torch.Tensor, gate_ND: torch.Tensor, up_ND: torch.Tensor) -> torch.Tensor:
    """h = silu(gate x) * up x, [T, N]."""
    return F.silu(x_TD @ gate_ND.T) * (x_TD @ up_ND.T)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Experts of one layer: S shared and E routed ones of F neurons each, K routed ones per token."""

    width: int
    experts: int
    shared: int
    size: int
    top_k: int


@dataclass(kw_only=True)
class Layer:
    """One dense FFN: y = down (silu(gate x) * up x), float32, without biases."""

    number: int
    gate_ND: torch.Tensor
    up_ND: torch.Tensor
    down_DN: torch.Tensor
    x_TD: torch.Tensor | None = None
    """What the FFN reads on the calibration tokens; None for methods that need no text."""
    importance_CN: torch.Tensor | None = None
    """Sum over the tokens of each text cluster of |h dL/dh|, for methods that need gradients."""
    _cache: torch.Tensor | None = field(default=None, repr=False)
    _energy: torch.Tensor | None = field(default=None, repr=False)

    @property
    def inputs(self) -> torch.Tensor:
        """x_TD. Raises ValueError if there is no calibration text."""
        if self.x_TD is None:
            raise ValueError(f"layer {self.number}: no calibration tokens, which this method needs")
        return self.x_TD

    def chunks(self, tokens: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(x, h) of the calibration tokens in order, or of those at the indices `tokens`, CHUNK at a time.

        h = silu(gate x) * up x, [CHUNK, N].
        """
        x_TD = self.inputs
        keep = x_TD.shape[0] * self.gate_ND.shape[0] * x_TD.element_size() <= CACHE_BYTES
        if keep and self._cache is None:
            self._cache = self._neurons(x_TD)
        places = torch.arange(len(x_TD), device=x_TD.device) if tokens is None else tokens
        for part in places.split(CHUNK):
            yield x_TD[part], self._cache[part] if self._cache is not None else self._neurons(x_TD[part])

    @property
    def energy_N(self) -> torch.Tensor:
        """What each neuron contributes on average over the calibration tokens: (h * norm of its down column)^2."""
        if self._energy is None:
            norm_N, total_N = self.down_DN.norm(dim=0), torch.zeros_like(self.down_DN[0])
            for _, h_TN in self.chunks():
                total_N += (h_TN * norm_N).square_().sum(0)
            self._energy = total_N / len(self.inputs)
        return self._energy

    def _neurons(self, x_TD: torch.Tensor) -> torch.Tensor:
        return neurons(x_TD, self.gate_ND, self.up_ND)

    def dense(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The FFN's output, [T, D]."""
        return self._neurons(x_TD) @ self.down_DN.T
