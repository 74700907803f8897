"""What a conversion is held against: the dense model with its FFNs replaced, layer by layer, on validation windows.

The oracles look at the answer and bound what can be reached; static pruning is the plainest alternative. Each is a
`Build`: it sees one dense FFN and gives the function that stands in its place.

    nats = measure(Streamed(folder), validation, neuron_oracle(0.5)).nats

Shapes: T tokens, D hidden, N neurons, M kept neurons, E routed experts, S shared, F neurons per expert, K top_k, B
windows, L their length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.moe.streamed import Streamed
from tasks.partition import pruned
from tasks.partition.layer import Layer

Ffn = Callable[[Tensor], Tensor]
"""What a layer computes in place of its dense FFN: [T, D] -> [T, D]."""
Build = Callable[[Layer], Ffn]
"""Makes it from the dense FFN, and from layer.x_TD where calibration windows were given."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Nats per predicted token of each domain, seconds of calibration and building, and the middle layer's FFN."""

    nats: dict[str, float]
    seconds: float
    middle: Ffn


class _Reader(nn.Module):
    """In the place of a block's FFN: notes what it reads and adds nothing, so that the block gives its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Tensor] = []

    def forward(self, x_BLD: Tensor) -> Tensor:
        self.parts.append(x_BLD.flatten(0, 1))
        return torch.zeros_like(x_BLD)


@torch.no_grad()
def measure(
    parent: Streamed,
    validation: Mapping[str, np.ndarray],
    build: Build,
    *,
    calibration: np.ndarray | None = None,
    batch: int = 4,
) -> Measured:
    """Loss of the dense parent with every FFN replaced.

    Each layer is built on the hidden states that the replaced layers below it hand up on the calibration windows.

    Args:
        parent: a dense checkpoint.
        validation: token ids of each domain's windows, int64 [B, L], L the same for all.
        calibration: int64 [B, L]; `build` sees no text without it.
        batch: windows that pass a block at once.
    """
    ids_BL = torch.from_numpy(np.concatenate(list(validation.values()))).to(parent.device)
    held_BLD = parent.embed(ids_BL)
    seen_BLD = parent.embed(torch.from_numpy(calibration)).to(parent.device) if calibration is not None else None
    dense_BLD = None if seen_BLD is None else seen_BLD.clone()  # of the parent as it is
    seconds = 0.0
    for i in range(parent.layers):
        start = time.perf_counter()
        block: Any = parent.block(i)
        mlp = block.mlp
        layer = Layer(number=i, gate_ND=mlp.gate_proj.weight, up_ND=mlp.up_proj.weight, down_DN=mlp.down_proj.weight)
        if seen_BLD is not None and dense_BLD is not None:
            layer.x_TD = _attend(parent, block, seen_BLD, layer=i, batch=batch)
            layer.weight_T = layer.relative(seen_BLD.flatten(0, 1))
            dense_TD = _attend(parent, block, dense_BLD, layer=i, batch=batch)
            layer.drift_TD = (dense_BLD - seen_BLD).flatten(0, 1)
            _add(dense_BLD, layer.dense, dense_TD, batch=batch)
        ffn = build(layer)
        if layer.x_TD is not None and seen_BLD is not None:
            _add(seen_BLD, ffn, layer.x_TD, batch=batch)
        seconds += time.perf_counter() - start
        _add(held_BLD, ffn, _attend(parent, block, held_BLD, layer=i, batch=batch), batch=batch)
        if i == parent.layers // 2:
            middle = ffn
    return Measured(nats=by_domain(_nll(parent, held_BLD, ids_BL), validation), seconds=seconds, middle=middle)


def by_domain(nats_B: np.ndarray, validation: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each domain over its windows, which stand one domain after the other."""
    ends = np.cumsum([len(ids) for ids in validation.values()])[:-1]
    return {name: float(part.mean()) for name, part in zip(validation, np.split(nats_B, ends), strict=True)}


def _attend(parent: Streamed, block: Any, hidden_BLD: Tensor, *, layer: int, batch: int) -> Tensor:
    """Pass the block but for its FFN, in place; returns what the FFN reads, [T, D]."""
    block.mlp = reader = _Reader()
    where = parent.attention(layer, hidden_BLD.shape[1])
    for part in hidden_BLD.split(batch):
        part.copy_(block(part, **where))
    return torch.cat(reader.parts)


def _add(hidden_BLD: Tensor, ffn: Ffn, x_TD: Tensor, *, batch: int) -> None:
    for part, x in zip(hidden_BLD.split(batch), x_TD.split(batch * hidden_BLD.shape[1]), strict=True):
        part += ffn(x).view_as(part)


def _nll(parent: Streamed, hidden_BLD: Tensor, ids_BL: Tensor) -> np.ndarray:
    """Mean nats of each window's tokens 2 to L, float64 [B]."""
    losses = [
        F.cross_entropy(parent.logits(hidden[None, :-1])[0], ids[1:], reduction="none").double().mean()
        for hidden, ids in zip(hidden_BLD, ids_BL, strict=True)
    ]
    return torch.stack(losses).cpu().numpy()


def dense(layer: Layer) -> Ffn:
    """The FFN as it is."""
    return layer.dense


def neuron_oracle(share: float, *, weighted: bool = False) -> Build:
    """Per token, only the largest `share` of the neurons by |h|, or by |h| times the norm of their down_proj column.

    No split and no router that may switch single neurons sees as much.
    """

    def build(layer: Layer) -> Ffn:
        norm_N = layer.down_DN.norm(dim=0) if weighted else torch.ones_like(layer.down_DN[0])
        keep = round(share * len(norm_N))

        def ffn(x_TD: Tensor) -> Tensor:
            h_TN = layer.neurons(x_TD)
            index_TM = (h_TN.abs() * norm_N).topk(keep, dim=1, sorted=False).indices
            kept_TN = torch.zeros_like(h_TN).scatter_(1, index_TM, h_TN.gather(1, index_TM))
            return kept_TN @ layer.down_DN.T

        return ffn

    return build


def static(share: float, *, refit: bool = False, fit_passes: int = 0, seed: int = 0) -> Build:
    """The `share` of neurons that contribute most on the calibration windows, the same for every token.

    It is the pruned baseline before training, by the code that cuts that (tasks/partition/pruned.py): `refit` and
    `fit_passes` as in settings.Partition.
    """

    def build(layer: Layer) -> Ffn:
        count = round(share * len(layer.gate_ND))
        kept = pruned.keep(layer, count, refit=refit, fit_passes=fit_passes, seed=seed)
        return Layer(number=layer.number, gate_ND=kept.gate_MD, up_ND=kept.up_MD, down_DN=kept.down_DM).dense

    return build


def expert_oracle(experts: Mapping[int, np.ndarray], *, shared: int, top_k: int) -> Build:
    """A given partition, its routed experts chosen by their true energy, the sum of (h |w_down|)^2 over their neurons.

    Bounds what a router can reach with that partition and the parent's weights. Every chosen expert has weight 1.

    Args:
        experts: neuron indices of every sparse layer, int32 [S + E, F], shared first; other layers stay dense.
        shared: S.
        top_k: K.
    """

    def build(layer: Layer) -> Ffn:
        if layer.number not in experts:
            return layer.dense
        norm_N = layer.down_DN.norm(dim=0)
        index_EF = torch.from_numpy(experts[layer.number].astype(np.int64)).to(norm_N.device)
        member_EN = norm_N.new_zeros(len(index_EF), len(norm_N)).scatter_(1, index_EF, 1.0)
        always_N, routed_EN = member_EN[:shared].sum(0), member_EN[shared:]

        def ffn(x_TD: Tensor) -> Tensor:
            h_TN = layer.neurons(x_TD)
            energy_TE = (h_TN * norm_N).square() @ routed_EN.T
            chosen_TE = torch.zeros_like(energy_TE).scatter_(1, energy_TE.topk(top_k, dim=1).indices, 1.0)
            y_TD: Tensor = (h_TN * (always_N + chosen_TE @ routed_EN)) @ layer.down_DN.T
            return y_TD

        return ffn

    return build
