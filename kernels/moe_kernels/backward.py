"""The experts layer backward in Triton: allocates and launches.

The kernels are in ``down_backward_kernel.py`` and ``backward_kernels.py``.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F, E experts, K top-k, M = T*K rows sorted by
expert, B row tiles. Index arrays: see ``routing.py``.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .backward_kernels import router_gradient_kernel, weight_gradient_kernel, x_gradient_kernel
from .config import tile
from .down_backward_kernel import down_backward_kernel
from .forward import (
    combine,
    gate_and_up_by_descriptor,
    gate_and_up_descriptor,
    gate_and_up_offset,
    loads_by_descriptor,
    row_tile_launch,
    tile_arguments,
    zero_padding,
)
from .routing import Routing


def experts_backward_triton(
    grad_out_TD: Tensor,
    x_TD: Tensor,
    w13: Tensor,
    w3: Tensor | None,
    w2_EDF: Tensor,
    hidden_MG: Tensor,
    *,
    weights_TK: Tensor | None,
    routing: Routing,
    need_x: bool,
    need_w13: bool,
    need_w2: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, w13, w3, w2 and the routing weights; None for those not needed.

    Args:
        grad_out_TD: upstream gradient, (T, D), the dtype of ``x_TD``.
        x_TD: tokens, (T, D), fp32, fp16 or bf16, on CUDA (on CPU only under ``TRITON_INTERPRET=1``).
        w13: ``[gate; up]`` projections, (E, 2F, D); with ``w3`` the gate projections alone, (E, F, D).
        w3: up projections, (E, F, D), or None.
        w2_EDF: down projections, (E, D, F).
        hidden_MG: ``[gate | up]`` pre-activations of the forward, (M, 2F), sorted rows.
        weights_TK: routing weights, (T, K), any floating dtype; None for all one.
        routing: the forward's.

    Returns:
        dx in the dtype of ``x_TD``; the others in the dtypes of what they are gradients of, from fp32 sums. Zeros for
        experts without rows, and for the rows of absent experts.
    """
    grad_out_TD, x_TD = _unit_stride(grad_out_TD), _unit_stride(x_TD)
    need_weights = need_weights and weights_TK is not None
    grad_hidden_MG, act_scaled_MF, grad_weights_TK = _down_backward(
        grad_out_TD,
        w2_EDF,
        hidden_MG,
        weights_TK=weights_TK,
        routing=routing,
        need_hidden=need_x or need_w13,
        need_act=need_w2,
        need_weights=need_weights,
    )
    grad_w2_EDF = grad_w13 = grad_w3 = grad_x_TD = None
    if act_scaled_MF is not None:
        grad_w2_EDF = _empty(w2_EDF.shape, w2_EDF)
        _weight_gradient("w2_gradient", grad_out_TD, act_scaled_MF, grad=grad_w2_EDF, grad_up=None, routing=routing)
        del act_scaled_MF
    if grad_hidden_MG is not None and need_w13:
        grad_w13 = _empty(w13.shape, w13)
        grad_w3 = None if w3 is None else _empty(w3.shape, w13)
        _weight_gradient("w13_gradient", grad_hidden_MG, x_TD, grad=grad_w13, grad_up=grad_w3, routing=routing)
    if grad_hidden_MG is not None and need_x:
        grad_x_TD = _x_gradient(grad_hidden_MG, w13, w3, tokens=x_TD.shape[0], routing=routing)
    return grad_x_TD, grad_w13, grad_w3, grad_w2_EDF, grad_weights_TK


def _down_backward(
    grad_out_TD: Tensor,
    w2_EDF: Tensor,
    hidden_MG: Tensor,
    *,
    weights_TK: Tensor | None,
    routing: Routing,
    need_hidden: bool,
    need_act: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``grad_hidden_MG``, ``act_scaled_MF`` and the gradient of the routing weights; None for those not needed."""
    _, model_dim, width = w2_EDF.shape
    rows = hidden_MG.shape[0]
    grad_hidden_MG = _empty(hidden_MG.shape, hidden_MG) if need_hidden else None
    act_scaled_MF = _empty((rows, width), hidden_MG) if need_act else None
    if not (need_hidden or need_act or need_weights) or rows == 0:
        grad_weights_TK = _empty(weights_TK.shape, weights_TK) if need_weights and weights_TK is not None else None
        return grad_hidden_MG, act_scaled_MF, grad_weights_TK
    grid, launch = row_tile_launch("down_backward", routing, rows=rows, columns=width, depth=model_dim, like=hidden_MG)
    n_col_tiles = launch["n_col_tiles"]
    ds_partial_MN = _empty((rows, n_col_tiles), hidden_MG, dtype=torch.float32) if need_weights else None
    w2_EDF = w2_EDF.to(hidden_MG.dtype).contiguous()
    tma = loads_by_descriptor(w2_EDF, width, depth=0)
    down_backward_kernel[grid](
        grad_out_ptr=grad_out_TD,
        w2_ptr=TensorDescriptor.from_tensor(w2_EDF, [1, launch["BLOCK_K"], launch["BLOCK_N"]]) if tma else w2_EDF,
        hidden_ptr=hidden_MG,
        weights_ptr=None if weights_TK is None else weights_TK.contiguous(),
        ds_partial_ptr=ds_partial_MN,
        act_scaled_ptr=act_scaled_MF,
        grad_hidden_ptr=grad_hidden_MG,
        flat_M=routing.flat_M,
        stride_gt=grad_out_TD.stride(0),
        D=model_dim,
        F=width,
        K=routing.top_k,
        ALIGN=math.gcd(width, 16),
        TMA=tma,
        **launch,
    )
    if ds_partial_MN is None or weights_TK is None:
        return grad_hidden_MG, act_scaled_MF, None
    grad_weights_TK = _empty(weights_TK.shape, weights_TK)
    block_columns = triton.next_power_of_2(n_col_tiles)
    block_rows = max(1, 2048 // block_columns)
    router_gradient_kernel[(triton.cdiv(rows, block_rows),)](
        ds_partial_ptr=ds_partial_MN,
        ds_ptr=grad_weights_TK,
        inverse_TK=routing.inverse_TK,
        offset_E1=routing.offset_E1,
        M=rows,
        E=routing.experts,
        n_col_tiles=n_col_tiles,
        BLOCK_M=block_rows,
        BLOCK_N=block_columns,
    )
    return grad_hidden_MG, act_scaled_MF, grad_weights_TK


def _weight_gradient(
    kernel: Literal["w13_gradient", "w2_gradient"],
    left: Tensor,
    right: Tensor,
    *,
    grad: Tensor,
    grad_up: Tensor | None,
    routing: Routing,
) -> None:
    """Fills ``grad[e] = left[rows of e]^T right[rows of e]``; with ``grad_up`` the lower half of the rows goes there.

    The rows of w2's left and of w13's right are tokens, gathered on loading; the other operand's are sorted.
    """
    experts, split, columns = grad.shape
    height, rows = left.shape[1], (right if kernel == "w2_gradient" else left).shape[0]
    jump = 0 if grad_up is None else (grad_up.data_ptr() - grad.data_ptr()) // grad.element_size() - split * columns
    shape = tile(
        kernel,
        rows_per_expert=rows / experts,
        columns=columns,
        depth=rows // experts,
        itemsize=left.element_size(),
    )
    n_row_tiles, n_col_tiles = triton.cdiv(height, shape.block_m), triton.cdiv(columns, shape.block_n)
    weight_gradient_kernel[(experts * n_row_tiles * n_col_tiles,)](
        left_ptr=left,
        right_ptr=right,
        grad_ptr=grad,
        flat_M=routing.flat_M,
        offset_E1=routing.offset_E1,
        stride_lm=left.stride(0),
        stride_rm=right.stride(0),
        split=split,
        jump=jump,
        R=height,
        C=columns,
        K=routing.top_k,
        n_row_tiles=n_row_tiles,
        n_col_tiles=n_col_tiles,
        GATHER_LEFT=kernel == "w2_gradient",
        ALIGN=math.gcd(height, columns, left.stride(0), right.stride(0), 16),
        **tile_arguments(shape),
    )


def _x_gradient(grad_hidden_MG: Tensor, w13: Tensor, w3: Tensor | None, *, tokens: int, routing: Routing) -> Tensor:
    """dx (T, D): one row for each routed row, then the sum of each token's K rows."""
    rows, model_dim, width = grad_hidden_MG.shape[0], w13.shape[2], grad_hidden_MG.shape[1] // 2
    gate, up_offset = gate_and_up_offset(w13, w3, dtype=grad_hidden_MG.dtype)
    grad_x_TD = _empty((tokens, model_dim), grad_hidden_MG)
    dx_MD = grad_x_TD if routing.flat_M is None else _empty((rows, model_dim), grad_hidden_MG)
    if rows:
        grid, launch = row_tile_launch(
            "x_gradient", routing, rows=rows, columns=model_dim, depth=2 * width, like=grad_hidden_MG
        )
        block_m, block_n, block_k = launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_K"]
        tma = gate_and_up_by_descriptor(gate, up_offset, depth=0) and loads_by_descriptor(gate, 2 * width, depth=0)
        hidden_ptr: Tensor | TensorDescriptor = grad_hidden_MG
        w13_ptr: Tensor | TensorDescriptor = gate
        if tma:
            hidden_ptr = TensorDescriptor.from_tensor(grad_hidden_MG, [block_m, block_k])
            w13_ptr = gate_and_up_descriptor(gate, up_offset, width=width, block=[1, 1, block_k, block_n])
        x_gradient_kernel[grid](
            grad_hidden_ptr=hidden_ptr,
            w13_ptr=w13_ptr,
            dx_ptr=dx_MD,
            stride_we=gate.stride(0),
            up_offset=up_offset,
            D=model_dim,
            F=width,
            ALIGN=math.gcd(width, 16),
            TMA=tma,
            **launch,
        )
    if routing.flat_M is None:
        zero_padding(grad_x_TD, routing)
    else:
        combine(dx_MD, grad_x_TD, weights_TK=None, routing=routing)
    return grad_x_TD


def _unit_stride(rows_TD: Tensor) -> Tensor:
    """The same rows with unit stride along D: an expanded gradient, from ``.sum()``, has stride 0."""
    return rows_TD if rows_TD.stride(1) == 1 else rows_TD.contiguous()


def _empty(shape: Sequence[int], like: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised and contiguous, whatever the strides of ``like``."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
