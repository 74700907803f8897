"""What public code makes of a dense FFN, built anew from its description, each evaluated in its own form.

LLaMA-MoE (arXiv 2406.16554, pjlab-sys4nlp/llama-moe): random or clustered experts, a gate from scratch.
CMoE (arXiv 2502.04416, JarvisPei/CMoE): experts by activation, a router out of representative neurons.
MoEBERT (arXiv 2204.07675) is the method `moebert` with a random router, and needs nothing here.

Shapes: T tokens, D hidden, N neurons, E routed experts, S shared, F neurons per expert, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import moe_kernels
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.partition.baselines import Build, Ffn
from tasks.partition import assignment
from tasks.partition.layer import Layer

GATE_STD = 0.02
"""Of LLaMA-MoE's gates at their start."""
ACTIVE_SHARE = 0.1
"""CMoE's K_a: the share of neurons that count as active on a token."""

Route = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x_TD -> chosen experts [T, K] and the weights of their outputs [T, K]."""


def llama_moe(
    split: Literal["random", "clustering"],
    *,
    experts: int,
    top_k: int,
    gate: Literal["tanh", "linear"] = "tanh",
    seed: int = 0,
) -> Build:
    """LLaMA-MoE right after its split: E equal experts, gate N(0, 0.02), softmax over the chosen times E / K.

    Args:
        split: neurons dealt at random, or by balanced k-means on the up_proj rows, each of length 1.
        gate: the released two layers with a tanh between them, or one linear layer.
        seed: of split and gate; every layer draws its own.
    """

    def build(layer: Layer) -> Ffn:
        draw = np.random.default_rng([seed, layer.number])
        index_EF = llama_moe_split(layer, split, experts=experts, generator=draw)
        shapes = [(experts, layer.up_ND.shape[1]), (experts, experts)][: 2 if gate == "tanh" else 1]
        first, *second = (torch.from_numpy(draw.normal(0, GATE_STD, shape)).to(layer.up_ND) for shape in shapes)

        def route(x_TD: Tensor) -> tuple[Tensor, Tensor]:
            logits_TE = x_TD @ first.T
            if second:
                logits_TE = logits_TE.tanh() @ second[0].T
            values_TK, chosen_TK = logits_TE.topk(top_k, dim=1)
            return chosen_TK, values_TK.softmax(1) * (experts / top_k)

        return _sparse(layer, index_EF, shared=0, route=route)

    return build


def llama_moe_split(
    layer: Layer, split: Literal["random", "clustering"], *, experts: int, generator: np.random.Generator
) -> np.ndarray:
    """Neuron indices of E equal experts, int64 [E, F]."""
    width = len(layer.up_ND)
    if split == "random":
        return generator.permutation(width).reshape(experts, -1)
    rows_ND = F.normalize(layer.up_ND, dim=1).cpu().numpy()
    group_N = assignment.kmeans(rows_ND, sizes_G=np.full(experts, width // experts), generator=generator)
    return np.stack([np.flatnonzero(group_N == expert) for expert in range(experts)])


def cmoe(*, experts: int, shared: int, top_k: int) -> Build:
    """CMoE before its fine-tuning: S shared and E routed experts, K of them chosen with weight 1.

    The h of an expert's representative neuron, taken on rows of length 1, is by its size the expert's score. The bias
    that balances loads starts at 0 and moves in training alone. Needs calibration windows.
    """

    def build(layer: Layer) -> Ffn:
        index_EF, representative_E = cmoe_split(layer, experts=experts, shared=shared)
        rows = torch.from_numpy(representative_E)
        gate_ED, up_ED = F.normalize(layer.gate_ND[rows], dim=1), F.normalize(layer.up_ND[rows], dim=1)

        def route(x_TD: Tensor) -> tuple[Tensor, Tensor]:
            score_TE = (F.silu(x_TD @ gate_ED.T) * (x_TD @ up_ED.T)).abs()
            chosen_TK = score_TE.topk(top_k, dim=1).indices
            return chosen_TK, torch.ones_like(chosen_TK, dtype=x_TD.dtype)

        return _sparse(layer, index_EF, shared=shared, route=route)

    return build


def cmoe_split(layer: Layer, *, experts: int, shared: int) -> tuple[np.ndarray, np.ndarray]:
    """Neuron indices of the experts, int64 [S + E, F], shared first, and of each routed one's representative, [E].

    A neuron is active on a token if its |h| is among the largest tenth, h taken on inputs and rows of length 1.
    Shared are the neurons that are active most often. The E that follow are centres, to which the others go in one
    optimal balanced assignment by the L1 distance of their activity; the nearest to its mean represents an expert.
    """
    active_TN = _active(layer)
    size = active_TN.shape[1] // (experts + shared)
    order_N = active_TN.mean(0).argsort(descending=True, stable=True)
    always, centres, rest = order_N[: shared * size], order_N[shared * size :][:experts], order_N[shared * size :]
    distance_RE = _l1(active_TN[:, rest], active_TN[:, centres]).double().cpu().numpy()
    group_R = torch.from_numpy(assignment.balanced(distance_RE, sizes_G=np.full(experts, size))).to(rest.device)
    members = [rest[group_R == expert] for expert in range(experts)]
    nearest = [_l1(active_TN[:, m], active_TN[:, m].mean(1, keepdim=True)).argmin() for m in members]
    index_EF = torch.cat([always, *members]).view(shared + experts, size)
    representative_E = torch.stack([m[place] for m, place in zip(members, nearest, strict=True)])
    return index_EF.cpu().numpy(), representative_E.cpu().numpy()


def _active(layer: Layer) -> Tensor:
    """1 where a neuron is among the largest of its token by |h|, [T, N]."""
    unit = Layer(
        number=layer.number,
        gate_ND=F.normalize(layer.gate_ND, dim=1),
        up_ND=F.normalize(layer.up_ND, dim=1),
        down_DN=layer.down_DN,
        x_TD=F.normalize(layer.inputs, dim=1),
    )
    count = max(1, round(ACTIVE_SHARE * len(layer.gate_ND)))
    parts = []
    for _, h_TN in unit.chunks():
        index = h_TN.abs().topk(count, dim=1, sorted=False).indices
        parts.append(torch.zeros_like(h_TN).scatter_(1, index, 1.0))
    return torch.cat(parts)


def _l1(markers_TR: Tensor, centres_TE: Tensor) -> Tensor:
    """Sum over tokens of |marker - centre|, [R, E], which is linear since markers are 0 or 1 and centres between."""
    return markers_TR.sum(0)[:, None] + centres_TE.sum(0) - 2 * markers_TR.T @ centres_TE


def _sparse(layer: Layer, index_EF: np.ndarray, *, shared: int, route: Route) -> Ffn:
    """The sparse layer out of the dense weights: routed experts by moe_kernels, shared ones as one FFN."""
    index = torch.from_numpy(index_EF.astype(np.int64)).to(layer.up_ND.device)
    routed_EF, always = index[shared:], index[:shared].flatten()
    w13_EGD = torch.cat([layer.gate_ND[routed_EF], layer.up_ND[routed_EF]], dim=1)
    w2_EDF = layer.down_DN.T[routed_EF].transpose(1, 2).contiguous()
    common = Layer(
        number=layer.number,
        gate_ND=layer.gate_ND[always],
        up_ND=layer.up_ND[always],
        down_DN=layer.down_DN[:, always].contiguous(),
    )

    def ffn(x_TD: Tensor) -> Tensor:
        out_TD = moe_kernels.experts_layer(x_TD, w13_EGD, w2_EDF, *route(x_TD))
        return out_TD + common.dense(x_TD) if shared else out_TD

    return ffn
