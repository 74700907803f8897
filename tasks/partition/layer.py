"""What every method sees of one dense FFN: its weights, and what passes through it on the calibration tokens.

Shapes: T tokens, D hidden, N neurons (FFN width), E routed experts, S shared experts, F neurons per expert, K routed
experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from tasks.settings import Partition

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
    elastic: bool = False
    """A token may pass other numbers of routed experts too (`Layer.top_k_T`), each with a weight of its own."""

    @classmethod
    def of(cls, partition: Partition, width: int) -> Self:
        """Those of a partition of an FFN of `width` neurons. Raises ValueError if the experts do not fit it."""
        return cls(
            width=width,
            experts=partition.experts,
            shared=partition.shared_experts,
            size=partition.check_width(width),
            top_k=partition.top_k,
            elastic=bool(partition.elastic),
        )

    @property
    def all_active(self) -> bool:
        """True if every token gets every expert, so that there is nothing to choose."""
        return self.top_k == self.experts and not self.elastic


@dataclass(kw_only=True)
class Layer:
    """One dense FFN: y = down (silu(gate x) * up x), float32, without biases."""

    number: int
    gate_ND: torch.Tensor
    up_ND: torch.Tensor
    down_DN: torch.Tensor
    x_TD: torch.Tensor | None = None
    """What the FFN reads on the calibration tokens; None for methods that need no text."""
    weight_T: torch.Tensor | None = None
    """What the squared error of each calibration token counts, 1 on average; None: 1 each.

    1 / (|r|^2 + |y|^2), r the residual that y, the FFN's output, is added to: the next norm divides by the size of
    their sum. Without it the few tokens of massive activations (arXiv 2402.17762), whose y is a thousand times as
    large, would be all that the layer that makes them, and the one that takes them back, are fitted to.
    """
    top_k_T: torch.Tensor | None = None
    """How many routed experts each calibration token passes; None: `Sizes.top_k`."""
    drift_TD: torch.Tensor | None = None
    """The dense model's hidden states less those here, before this FFN: a refit makes good what was lost below."""
    dtype: torch.dtype = torch.float32
    """Of the products that give the neurons and the output on the calibration tokens."""
    importance_CN: torch.Tensor | None = None
    """Sum over the tokens of each text cluster of |h dL/dh|, for methods that need gradients."""
    _cache: torch.Tensor | None = field(default=None, repr=False)
    _energy: torch.Tensor | None = field(default=None, repr=False)
    _output: torch.Tensor | None = field(default=None, repr=False)

    @property
    def inputs(self) -> torch.Tensor:
        """x_TD. Raises ValueError if there is no calibration text."""
        if self.x_TD is None:
            raise ValueError(f"layer {self.number}: no calibration tokens, which this method needs")
        return self.x_TD

    def weights(self, tokens: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """`weight_T` in the parts that `chunks` gives, [CHUNK]."""
        weight_T = self.weight_T
        if weight_T is None:
            weight_T = torch.ones(len(self.inputs), device=self.inputs.device)
        yield from (weight_T if tokens is None else weight_T[tokens]).split(CHUNK)

    def chosen(self, tokens: torch.Tensor | None = None) -> Iterator[torch.Tensor | None]:
        """`top_k_T` in the parts that `chunks` gives, [CHUNK]; None for each part without it."""
        count = len(self.inputs if tokens is None else tokens)
        if self.top_k_T is None:
            yield from [None] * max(1, -(-count // CHUNK))  # `split` gives one part of no tokens too
        else:
            yield from (self.top_k_T if tokens is None else self.top_k_T[tokens]).split(CHUNK)

    def chunks(self, tokens: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(x, h) of the calibration tokens in order, or of those at the indices `tokens`, CHUNK at a time.

        h = silu(gate x) * up x, float32 [CHUNK, N].
        """
        x_TD = self.inputs
        keep = x_TD.shape[0] * self.gate_ND.shape[0] * self.dtype.itemsize <= CACHE_BYTES
        if keep and self._cache is None:
            self._cache = torch.cat([self._given(part) for part in x_TD.split(CHUNK)])
        if tokens is None:  # views
            parts = [slice(start, start + CHUNK) for start in range(0, len(x_TD), CHUNK)]
        else:
            parts = list(tokens.split(CHUNK))
        for part in parts:
            h_TN = self._cache[part] if self._cache is not None else self._given(x_TD[part])
            yield x_TD[part], h_TN.float()

    @property
    def energy_N(self) -> torch.Tensor:
        """What each neuron contributes on average over the calibration tokens: (h * norm of its down column)^2."""
        if self._energy is None:
            norm_N, total_N = self.down_DN.norm(dim=0), torch.zeros_like(self.down_DN[0])
            for (_, h_TN), weight_T in zip(self.chunks(), self.weights(), strict=True):
                total_N += weight_T @ (h_TN * norm_N).square_()
            self._energy = total_N / len(self.inputs)
        return self._energy

    @property
    def output_TD(self) -> torch.Tensor:
        """What the dense FFN gives on the calibration tokens."""
        if self._output is None:
            down_ND = self.down_DN.T.to(self.dtype)
            self._output = torch.cat([(h_TN.to(self.dtype) @ down_ND).float() for _, h_TN in self.chunks()])
        return self._output

    def relative(self, residual_TD: torch.Tensor) -> torch.Tensor:
        """`weight_T` for the residual that the FFN's output is added to."""
        size_T = residual_TD.square().sum(1) + self.output_TD.square().sum(1)
        weight_T = size_T.clamp_min(1e-12).reciprocal()
        return weight_T / weight_T.mean()

    def _given(self, x_TD: torch.Tensor) -> torch.Tensor:
        """`neurons` in `dtype`."""
        return neurons(x_TD.to(self.dtype), self.gate_ND.to(self.dtype), self.up_ND.to(self.dtype))

    def neurons(self, x_TD: torch.Tensor) -> torch.Tensor:
        """h = silu(gate x) * up x, [T, N]."""
        return neurons(x_TD, self.gate_ND, self.up_ND)

    def dense(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The FFN's output, [T, D]."""
        return self.neurons(x_TD) @ self.down_DN.T
