"""One sparse layer as the analyses see it: weights, what it did with a text, the neurons that it was cut from.

Shapes: E routed experts, S shared ones of the same width, X = S + E, the shared ones first; F neurons of an expert, D
hidden, T tokens of the text, K routed experts that a token passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.moe.internals.layers import SparseFfn
from tasks.moe.streamed import Streamed
from tasks.partition import convert
from tasks.plugins.analysis.text import Text

Matrix = Literal["gate", "up", "down"]
MATRICES: tuple[Matrix, ...] = ("gate", "up", "down")
_CHUNK = 256  # tokens whose outputs of all experts are in memory at once


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the router and the experts of a layer read and chose when the model ran as it is used."""

    text: Text
    inputs_TD: Tensor
    """What router and experts read."""
    logits_TE: Tensor
    """The router's, before softmax."""
    chosen_TK: Tensor
    below_TK: Tensor | None = None
    """What the sparse layer below chose for the same tokens; None in the first."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What all experts, chosen or not, make of a layer's input; float64."""

    norm_TX: np.ndarray
    cosine_XX: np.ndarray
    """Mean over the tokens of the cosine of two experts' outputs."""
    angular_XX: np.ndarray
    """Mean over the tokens of 1 - arccos(cosine) / pi."""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The dense checkpoint that the experts were cut from."""

    model: Streamed
    places: Mapping[int, np.ndarray] | None
    """{layer: int [X, F], the parent's neuron at each place}; None: every expert is a whole FFN of the parent's."""

    def slices(self, layer: int, matrix: Matrix) -> Tensor:
        """The parent's weights of one matrix, float32 [X, F, D], or [1, F, D] where all experts have the same."""
        weight = dict(zip(MATRICES, convert.ffn(self.model, layer), strict=True))[matrix].float()
        rows_ND = weight.T if matrix == "down" else weight
        return rows_ND[None] if self.places is None else rows_ND[torch.from_numpy(self.places[layer]).long()]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A sparse layer. `seen` is None without a text, `other` (the same layer of a second checkpoint) without one."""

    number: int
    ffn: SparseFfn
    activation: Callable[[Tensor], Tensor]
    parent: Parent | None = None
    seen: Seen | None = None
    other: Layer | None = None

    @property
    def experts(self) -> int:
        """E."""
        return len(self.ffn.gate_EFD)

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.ffn.router.top_k)

    @property
    def router_ED(self) -> Tensor:
        """The router's rows."""
        weight: Tensor = self.ffn.router.weight
        return weight.detach()

    @cached_property
    def shared(self) -> int:
        """S: 0 also where the shared experts' width is no multiple of F, or where they are idle, with zero weights."""
        width, size = len(self.ffn.shared_gate_MD), self.ffn.gate_EFD.shape[1]
        return 0 if width % size or not bool(self.ffn.shared_down_DM.any()) else width // size

    def matrix(self, name: Matrix) -> Tensor:
        """The weights of one matrix by neuron: [X, F, D]; columns of `down` are rows here."""
        parts = self.ffn
        routed_EFD, shared_MD = {
            "gate": (parts.gate_EFD, parts.shared_gate_MD),
            "up": (parts.up_EFD, parts.shared_up_MD),
            "down": (parts.down_EDF.mT, parts.shared_down_DM.T),
        }[name]
        if not self.shared:
            return routed_EFD
        return torch.cat([shared_MD.reshape(self.shared, *routed_EFD.shape[1:]), routed_EFD])

    def source(self, name: Matrix) -> Tensor | None:
        """The parent's weights at the same places, [X or 1, F, D]; None where the parent is not known."""
        return None if self.parent is None else self.parent.slices(self.number, name)

    def text(self) -> Seen:
        """What was seen. Raises ValueError without a text."""
        if self.seen is None:
            raise ValueError(f"layer {self.number}: no text went through it; give windows")
        return self.seen

    def expert(self, x_TD: Tensor, e: int) -> Tensor:
        """What expert `e` of the X makes of x: [T, D], without the router's weight and the shared experts' switch."""
        parts, size = self.ffn, self.ffn.gate_EFD.shape[1]
        if e < self.shared:
            rows = slice(e * size, (e + 1) * size)
            gate, up, down = parts.shared_gate_MD[rows], parts.shared_up_MD[rows], parts.shared_down_DM[:, rows]
        else:
            gate, up, down = (each[e - self.shared] for each in (parts.gate_EFD, parts.up_EFD, parts.down_EDF))
        return F.linear(self.activation(F.linear(x_TD, gate)) * F.linear(x_TD, up), down)

    @cached_property
    def outputs(self) -> Outputs:
        """Every expert on every token: the second stage of the protocol of arXiv 2406.18219, section 4.1."""
        inputs_TD = self.text().inputs_TD
        experts = self.shared + self.experts
        norms, sums = [], torch.zeros(2, experts, experts, dtype=torch.float64, device=inputs_TD.device)
        for x_TD in inputs_TD.split(_CHUNK):
            out_TXD = torch.stack([self.expert(x_TD, e) for e in range(experts)], dim=1).double()
            gram_TXX = out_TXD @ out_TXD.mT
            norm_TX = gram_TXX.diagonal(dim1=1, dim2=2).sqrt()
            size_TXX = (norm_TX[:, :, None] * norm_TX[:, None]).clamp_min(1e-300)
            cosine_TXX = (gram_TXX / size_TXX).clamp(-1, 1)
            sums[0] += cosine_TXX.sum(0)
            sums[1] += (1 - cosine_TXX.arccos() / torch.pi).sum(0)
            norms.append(norm_TX)
        cosine_XX, angular_XX = (sums / len(inputs_TD)).cpu().numpy()
        return Outputs(norm_TX=torch.cat(norms).cpu().numpy(), cosine_XX=cosine_XX, angular_XX=angular_XX)
