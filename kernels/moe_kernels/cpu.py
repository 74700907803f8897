"""The experts layer in plain torch operators, forward and hand-written backward: the CPU path.

One autograd Function with two regimes (``sorted_path.py``, ``dense_path.py``) that save the same things: the
Parameters themselves, never a view of one. A saved view would keep a gathered weight alive from forward to backward,
which cancels ZeRO-3. Nothing here uses atomics: equal inputs give equal bits.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F, E experts, K top-k, M = T*K routed rows.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import moe_kernels.dense_path as dense_path
import moe_kernels.sorted_path as sorted_path
from moe_kernels.routing import build_routing

Regime = Literal["sorted", "dense"]

# In units of one hidden unit of width, a routed row costs the sorted regime F for its FLOPs and a toll for moving D
# elements in and out and for GEMMs too narrow to run at full speed; it costs the dense regime (E/K) * F and no toll.
# The faster the GEMMs of a dtype, the more units the same toll is worth. Read off the table in docs/kernels.md.
TOLL_FULL_PRECISION = 28
TOLL_HALF_PRECISION = 60


def choose_regime(experts: int, top_k: int, *, width: int, tokens: int, dtype: torch.dtype) -> Regime:
    """The faster regime on CPU, by arithmetic intensity.

    Args:
        experts: E.
        top_k: K.
        width: F, the intermediate width of one expert.
        tokens: T; with fewer routed rows than experts the dense regime would read weights nobody asked for.
        dtype: the dtype of the GEMMs.

    Returns:
        ``"dense"`` (compute every expert for every token in three wide GEMMs) for very narrow or nearly all experts,
        otherwise ``"sorted"`` (one GEMM an expert over its own rows).
    """
    if tokens * top_k < experts:
        return "sorted"
    toll = TOLL_HALF_PRECISION if dtype.itemsize <= 2 else TOLL_FULL_PRECISION
    return "dense" if experts * width <= top_k * (width + toll) else "sorted"


def check_shapes(
    x_TD: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
) -> None:
    """Raises ValueError, naming the tensor and the shape it should have, unless the five shapes agree."""
    if x_TD.dim() != 2 or w13_EGD.dim() != 3 or top_k_index_TK.dim() != 2:
        raise ValueError(
            "experts layer: expected x (T, D), w13 (E, 2F, D) and top_k_index (T, K), "
            f"got {tuple(x_TD.shape)}, {tuple(w13_EGD.shape)} and {tuple(top_k_index_TK.shape)}"
        )
    tokens, hidden = x_TD.shape
    experts, width = w13_EGD.shape[0], w13_EGD.shape[1] // 2
    expected = {
        "w13": (w13_EGD, (experts, 2 * width, hidden)),
        "w2": (w2_EDF, (experts, hidden, width)),
        "top_k_index": (top_k_index_TK, (tokens, top_k_index_TK.shape[1])),
        "top_k_weights": (top_k_weights_TK, tuple(top_k_index_TK.shape)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"experts layer: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def compute_dtype(x_TD: Tensor, w13_EGD: Tensor) -> torch.dtype:
    """The dtype of the GEMMs: autocast's where it is on (never for fp64), otherwise that of the weights."""
    device = x_TD.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (x_TD.dtype, w13_EGD.dtype):
        return torch.get_autocast_dtype(device)
    return w13_EGD.dtype


class ExpertsFunction(torch.autograd.Function):
    """Gradients for x, w13, w2 and the routing weights; an expert without tokens gets zeros, never None."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w13_EGD: Tensor,
        w2_EDF: Tensor,
        top_k_index_TK: Tensor,
        top_k_weights_TK: Tensor,
        regime: Regime,
        dtype: torch.dtype,
    ) -> Tensor:
        path: Any = dense_path if regime == "dense" else sorted_path
        if top_k_index_TK.numel() and not 0 <= int(top_k_index_TK.min()) <= int(top_k_index_TK.max()) < len(w13_EGD):
            raise IndexError("experts layer: top_k_index outside the experts")
        if regime == "dense":
            where: dict[str, Any] = {"index_TK": top_k_index_TK}
        else:
            where = {"routing": build_routing(top_k_index_TK, experts=len(w13_EGD))}
        with torch.autocast(x_TD.device.type, enabled=False):
            x_cast_TD = x_TD.to(dtype).contiguous()
            out_TD, hidden = path.forward(x_cast_TD, w13_EGD, None, w2_EDF, weights_TK=top_k_weights_TK, **where)
        ctx.path, ctx.x_dtype, ctx.where = path, x_TD.dtype, where
        ctx.save_for_backward(x_cast_TD, w13_EGD, w2_EDF, top_k_weights_TK, hidden)
        return out_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w13_EGD, w2_EDF, top_k_weights_TK, hidden = ctx.saved_tensors
        need_x, need_w13, need_w2, _, need_weights, _, _ = ctx.needs_input_grad
        with torch.autocast(x_TD.device.type, enabled=False):
            grad_x_TD, grad_w13_EGD, _, grad_w2_EDF, grad_weights_TK = ctx.path.backward(
                grad_out_TD.to(x_TD.dtype).contiguous(),
                x_TD,
                w13_EGD,
                None,
                w2_EDF,
                hidden,
                weights_TK=top_k_weights_TK,
                **ctx.where,
                need_x=need_x,
                need_w13=need_w13,
                need_w2=need_w2,
                need_weights=need_weights,
            )
        if grad_x_TD is not None:
            grad_x_TD = grad_x_TD.to(ctx.x_dtype)
        return grad_x_TD, grad_w13_EGD, grad_w2_EDF, None, grad_weights_TK, None, None


def experts_torch(
    x_TD: Tensor,
    w13_EGD: Tensor,
    w2_EDF: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    *,
    regime: Regime | None = None,
) -> Tensor:
    """The experts layer of :func:`moe_kernels.reference.experts_reference`, fast on CPU and correct on any device.

    Args:
        x_TD: tokens, (T, D), any strides; T may be 0.
        w13_EGD: ``[gate; up]`` projections, (E, 2F, D); pass the Parameter itself, not a view or a cast of it.
        w2_EDF: down projections, (E, D, F); the same holds.
        top_k_index_TK: chosen experts, integers in ``[0, E)``, (T, K).
        top_k_weights_TK: routing weights, (T, K), any floating dtype; need not sum to one.
        regime: ``"sorted"`` or ``"dense"``; by default :func:`choose_regime` on CPU, and ``"sorted"`` elsewhere.

    Returns:
        (T, D) in the dtype of ``x_TD``. Under autocast the GEMMs run in autocast's dtype.

    Raises:
        ValueError: a shape does not fit.
        IndexError, RuntimeError: an index is outside ``[0, E)``.
    """
    check_shapes(x_TD, w13_EGD, w2_EDF, top_k_index_TK, top_k_weights_TK)
    dtype = compute_dtype(x_TD, w13_EGD)
    if regime is None:
        experts, width = w13_EGD.shape[0], w2_EDF.shape[2]
        tokens, top_k = top_k_index_TK.shape
        on_cpu = x_TD.device.type == "cpu"
        regime = choose_regime(experts, top_k, width=width, tokens=tokens, dtype=dtype) if on_cpu else "sorted"
    out_TD: Tensor = ExpertsFunction.apply(x_TD, w13_EGD, w2_EDF, top_k_index_TK, top_k_weights_TK, regime, dtype)
    return out_TD
