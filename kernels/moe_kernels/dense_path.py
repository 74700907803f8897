"""Every expert for every token in three wide GEMMs: the path for very narrow experts.

At F = 12 a routed row holds 6*D*F FLOPs, which cost about as much as moving its 2*D elements in and out. Computing all
experts skips the move, and the GEMMs are as wide as the dense layer's. The weight of an expert not chosen is zero.

Zero times infinity or NaN is NaN. An expert that a token did not choose may overflow, or hold NaN, and must not reach
that token or its gradients. NaN survives every sum, so one sum over each result detects it: where the sum is not
finite, :mod:`moe_kernels.sorted_path`, which reads only what was chosen, computes the result again.

Activations are laid out (hidden units, tokens), so that gates, ups and routing weights are contiguous runs of tokens
and the up projections are used as they are stored; only w2 is copied, to (E, F, D).

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F, E experts, K top-k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_kernels.sorted_path as sorted_path

from .routing import build_routing, in_range


def forward(
    x_TD: Tensor, w13_EGD: Tensor, w3: None, w2_EDF: Tensor, *, weights_TK: Tensor, index_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """The output (T, D) and the pre-activations, E * G * T of them as (T, E * G), both in the dtype of ``x_TD``.

    The signature is that of ``sorted_path.forward``; separate up projections are not computed here. An index of E
    names an absent expert, which adds nothing. The layout of the pre-activations is for :func:`backward` alone.

    Raises:
        IndexError: as :func:`moe_kernels.routing.build_routing`.
    """
    experts, _, width = w2_EDF.shape
    tokens, dtype = x_TD.shape[0], x_TD.dtype
    index_TK = in_range(index_TK, experts=experts)
    hidden_EGT = (w13_EGD.to(dtype).flatten(0, 1) @ x_TD.contiguous().t()).view(experts, 2 * width, tokens)
    gate_EFT, up_EFT = hidden_EGT.split(width, dim=1)
    act_EFT = F.silu(gate_EFT).mul_(up_EFT).mul_(_weights(index_TK, weights_TK, experts=experts, dtype=dtype))
    out_TD = act_EFT.flatten(0, 1).t() @ _unit_rows(w2_EDF, dtype)
    if not _finite(out_TD):
        routing = build_routing(index_TK, experts=experts)
        out_TD, _ = sorted_path.forward(
            x_TD, w13_EGD, None, w2_EDF, weights_TK=weights_TK, routing=routing, keep_hidden=False
        )
    return out_TD, hidden_EGT.view(tokens, experts * 2 * width)


def backward(
    grad_out_TD: Tensor,
    x_TD: Tensor,
    w13_EGD: Tensor,
    w3: None,
    w2_EDF: Tensor,
    hidden: Tensor,
    *,
    weights_TK: Tensor,
    index_TK: Tensor,
    need_x: bool,
    need_w13: bool,
    need_w2: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, Tensor | None]:
    """Gradients of x, w13, w3 (None), w2 and the routing weights; None only for those not needed."""
    experts, model_dim, width = w2_EDF.shape
    tokens, dtype = x_TD.shape[0], x_TD.dtype
    index_TK = in_range(index_TK, experts=experts)
    weight_E1T = _weights(index_TK, weights_TK, experts=experts, dtype=dtype)
    gate_EFT, up_EFT = hidden.view(experts, 2 * width, tokens).split(width, dim=1)
    silu_EFT = F.silu(gate_EFT)
    act_EFT = silu_EFT * up_EFT
    grad_x_TD = grad_w13_EGD = grad_w2_EDF = grad_weights_TK = None

    if need_x or need_w13 or need_weights:
        grad_act_EFT = (_unit_rows(w2_EDF, dtype) @ grad_out_TD.t()).view(experts, width, tokens)
        if need_weights:
            # <dO, Y> = <dO W2, a>: the gradient of a routing weight needs no expert output.
            sum_dtype = torch.promote_types(dtype, torch.float32)
            grad_weights_ET = (grad_act_EFT * act_EFT).sum(1, dtype=sum_dtype)
            grad_weights_TK = F.pad(grad_weights_ET.t(), (0, 1)).gather(1, index_TK).to(weights_TK.dtype)
    if need_w2:
        act_EFT.mul_(weight_E1T)
        grad_w2_EDF = torch.empty_like(w2_EDF, memory_format=torch.contiguous_format)
        grad_w2_EFD = (act_EFT.flatten(0, 1) @ grad_out_TD).view(experts, width, model_dim)
        grad_w2_EDF.copy_(grad_w2_EFD.transpose(1, 2))
    if need_x or need_w13:
        grad_act_EFT.mul_(weight_E1T)
        grad_hidden_EGT = torch.empty_like(hidden).view(experts, 2 * width, tokens)
        grad_gate_EFT, grad_up_EFT = grad_hidden_EGT.split(width, dim=1)
        torch.mul(grad_act_EFT, silu_EFT, out=grad_up_EFT)
        torch.ops.aten.silu_backward.grad_input(grad_act_EFT.mul_(up_EFT), gate_EFT, grad_input=grad_gate_EFT)
        grad_hidden = grad_hidden_EGT.flatten(0, 1)
        if need_x:
            grad_x_TD = grad_hidden.t() @ w13_EGD.to(dtype).flatten(0, 1)
        if need_w13:
            grad_w13_EGD = (grad_hidden @ x_TD.contiguous()).view(w13_EGD.shape).to(w13_EGD.dtype)
    if _finite(grad_x_TD, grad_w13_EGD, grad_w2_EDF, grad_weights_TK):
        return grad_x_TD, grad_w13_EGD, None, grad_w2_EDF, grad_weights_TK
    routing = build_routing(index_TK, experts=experts)
    _, hidden = sorted_path.forward(x_TD, w13_EGD, None, w2_EDF, weights_TK=weights_TK, routing=routing)
    grad_x_TD, grad_w13_EGD, _, grad_w2_EDF, grad_weights_TK = sorted_path.backward(
        grad_out_TD,
        x_TD,
        w13_EGD,
        None,
        w2_EDF,
        hidden,
        weights_TK=weights_TK,
        routing=routing,
        need_x=need_x,
        need_w13=need_w13,
        need_w2=need_w2,
        need_weights=need_weights,
    )
    return grad_x_TD, grad_w13_EGD, None, grad_w2_EDF, grad_weights_TK


def _finite(*results: Tensor | None) -> bool:
    """False if one of them holds NaN or infinity; also for a sum that overflows by itself, which costs time alone."""
    return all(
        result is None or bool(result.sum(dtype=torch.promote_types(result.dtype, torch.float32)).isfinite())
        for result in results
    )


def _unit_rows(w2_EDF: Tensor, dtype: torch.dtype) -> Tensor:
    """The down projections as (E * F, D), one row a hidden unit, cast in the same copy."""
    experts, model_dim, width = w2_EDF.shape
    w2_EFD = torch.empty((experts, width, model_dim), dtype=dtype, device=w2_EDF.device)
    return w2_EFD.copy_(w2_EDF.transpose(1, 2)).flatten(0, 1)


def _weights(index_TK: Tensor, weights_TK: Tensor, *, experts: int, dtype: torch.dtype) -> Tensor:
    """(E, 1, T), zero where not chosen; adds, so that an expert named twice counts twice. Row E is for the absent."""
    weights_E1T = torch.zeros((experts + 1, index_TK.shape[0]), dtype=dtype, device=index_TK.device)
    return weights_E1T.scatter_add_(0, index_TK.t(), weights_TK.t().to(dtype))[:experts].unsqueeze(1)
