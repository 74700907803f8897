"""One GEMM an expert over its own rows: the path for experts wide enough to pay for moving rows.

Rows are gathered expert by expert, so that a gathered slice is still in cache when its GEMM reads it and no (M, D)
copy of the tokens exists. The K rows of a token are added in the order of k, in fp32 or better, by one
``embedding_bag`` pass. Rows past the last expert (absent experts, padding) are not computed and count as zero.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F, E experts, K top-k, M = T*K rows sorted by
expert, C rows of one expert.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import Routing


def forward(
    x_TD: Tensor, w13: Tensor, w3_EFD: Tensor | None, w2_EDF: Tensor, *, weights_TK: Tensor | None, routing: Routing
) -> tuple[Tensor, Tensor]:
    """The output (T, D) and the pre-activations (M, G) in sorted order, both in the dtype of ``x_TD``.

    Args:
        x_TD: tokens in the dtype of the GEMMs.
        w13: ``[gate; up]`` (E, 2F, D), or the gate alone (E, F, D) where ``w3_EFD`` is given; any floating dtype.
        w3_EFD: up projections, or None.
        w2_EDF: down projections.
        weights_TK: routing weights; None for rows that came sorted.
        routing: of these tokens; its rows past ``offset_E1[E]`` are skipped.
    """
    _, model_dim, width = w2_EDF.shape
    dtype = x_TD.dtype
    bounds: list[int] = routing.offset_E1.tolist()
    token_M, weights_M1 = _rows(routing, weights_TK, dtype=dtype)
    rows_total = x_TD.shape[0] if token_M is None else token_M.numel()
    hidden_MG = x_TD.new_empty((rows_total, 2 * width))
    y_MD = x_TD.new_empty((rows_total, model_dim))
    y_MD[bounds[-1] :].zero_()
    for expert, rows in _slices(bounds):
        if rows.start == rows.stop:
            continue
        hidden_CG = hidden_MG[rows]
        rows_CD = _take(x_TD, token_M, rows)
        if w3_EFD is None:
            torch.mm(rows_CD, w13[expert].to(dtype).t(), out=hidden_CG)
        else:
            torch.mm(rows_CD, w13[expert].to(dtype).t(), out=hidden_CG[:, :width])
            torch.mm(rows_CD, w3_EFD[expert].to(dtype).t(), out=hidden_CG[:, width:])
        act_CF = F.silu(hidden_CG[:, :width]).mul_(hidden_CG[:, width:])
        if weights_M1 is not None:
            act_CF.mul_(weights_M1[rows])
        torch.mm(act_CF, w2_EDF[expert].to(dtype).t(), out=y_MD[rows])
    return _combine(y_MD, routing), hidden_MG


def backward(
    grad_out_TD: Tensor,
    x_TD: Tensor,
    w13: Tensor,
    w3_EFD: Tensor | None,
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
    """Gradients of x, w13, w3, w2 and the routing weights; None only for those not needed or not there.

    An expert without rows gets zeros, never None: a missing gradient desynchronises data-parallel reductions.
    """
    _, model_dim, width = w2_EDF.shape
    dtype = x_TD.dtype
    bounds: list[int] = routing.offset_E1.tolist()
    token_M, weights_M1 = _rows(routing, weights_TK, dtype=dtype)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    grad_x_MD = x_TD.new_empty((hidden_MG.shape[0], model_dim)) if need_x else None
    grad_w13, grad_w3_EFD = (
        torch.empty_like(w, memory_format=torch.contiguous_format) if need_w13 and w is not None else None
        for w in (w13, w3_EFD)
    )
    grad_w2_EDF = torch.empty_like(w2_EDF, memory_format=torch.contiguous_format) if need_w2 else None
    grad_weights_M = x_TD.new_empty(hidden_MG.shape[0], dtype=sum_dtype) if need_weights else None
    for buffer in (grad_x_MD, grad_weights_M):
        if buffer is not None:
            buffer[bounds[-1] :].zero_()

    for expert, rows in _slices(bounds):
        if rows.start == rows.stop:
            for grad in (grad_w13, grad_w3_EFD, grad_w2_EDF):
                if grad is not None:
                    grad[expert].zero_()
            continue
        gate_CF, up_CF = hidden_MG[rows].split(width, dim=1)
        grad_out_CD = _take(grad_out_TD, token_M, rows)
        silu_CF = F.silu(gate_CF)
        act_CF = silu_CF * up_CF
        if need_x or need_w13 or need_weights:
            grad_act_CF = grad_out_CD @ w2_EDF[expert].to(dtype)
            if grad_weights_M is not None:
                # <dO, Y> = <dO W2, a>: the gradient of a routing weight needs no expert output.
                torch.sum(grad_act_CF * act_CF, 1, dtype=sum_dtype, out=grad_weights_M[rows])
        if grad_w2_EDF is not None:
            if weights_M1 is not None:
                act_CF.mul_(weights_M1[rows])
            _mm_into(grad_w2_EDF[expert], grad_out_CD.t(), act_CF)
        if need_x or need_w13:
            if weights_M1 is not None:
                grad_act_CF.mul_(weights_M1[rows])
            grad_hidden_CG = torch.empty_like(hidden_MG[rows])
            grad_gate_CF, grad_up_CF = grad_hidden_CG.split(width, dim=1)
            torch.mul(grad_act_CF, silu_CF, out=grad_up_CF)
            torch.ops.aten.silu_backward.grad_input(grad_act_CF.mul_(up_CF), gate_CF, grad_input=grad_gate_CF)
            if grad_x_MD is not None:
                if w3_EFD is None:
                    torch.mm(grad_hidden_CG, w13[expert].to(dtype), out=grad_x_MD[rows])
                else:
                    torch.mm(grad_gate_CF, w13[expert].to(dtype), out=grad_x_MD[rows])
                    grad_x_MD[rows].addmm_(grad_up_CF, w3_EFD[expert].to(dtype))
            if grad_w13 is not None:
                rows_CD = _take(x_TD, token_M, rows)
                if grad_w3_EFD is None:
                    _mm_into(grad_w13[expert], grad_hidden_CG.t(), rows_CD)
                else:
                    _mm_into(grad_w13[expert], grad_gate_CF.t(), rows_CD)
                    _mm_into(grad_w3_EFD[expert], grad_up_CF.t(), rows_CD)

    grad_x_TD = None if grad_x_MD is None else _combine(grad_x_MD, routing)
    grad_weights_TK = None
    if grad_weights_M is not None and weights_TK is not None:
        grad_weights_TK = grad_weights_M[routing.inverse_TK].to(weights_TK.dtype)
    return grad_x_TD, grad_w13, grad_w3_EFD, grad_w2_EDF, grad_weights_TK


def _rows(routing: Routing, weights_TK: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Token and routing weight (M, 1) of each sorted row; None where the rows came sorted, or have no weights."""
    if routing.flat_M is None:
        return None, None
    flat_M = routing.flat_M
    weights_M1 = None if weights_TK is None else weights_TK.reshape(-1)[flat_M].to(dtype).unsqueeze(1)
    return flat_M // max(routing.top_k, 1), weights_M1


def _take(rows_TD: Tensor, token_M: Tensor | None, rows: slice) -> Tensor:
    return rows_TD[rows] if token_M is None else rows_TD.index_select(0, token_M[rows])


def _slices(bounds: list[int]) -> Iterator[tuple[int, slice]]:
    for expert in range(len(bounds) - 1):
        yield expert, slice(bounds[expert], bounds[expert + 1])


def _combine(y_MD: Tensor, routing: Routing) -> Tensor:
    """(T, D): the sum of each token's K rows, in the order of k, accumulated in fp32 or better."""
    if routing.inverse_TK is None:
        return y_MD
    if routing.inverse_TK.numel() == 0:
        return y_MD.new_zeros((routing.inverse_TK.shape[0], y_MD.shape[1]))
    return F.embedding_bag(routing.inverse_TK, y_MD, mode="sum")


def _mm_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out = left @ right``, without a temporary where the dtypes agree (they differ under autocast)."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
