"""One GEMM an expert over its own rows: the regime for experts wide enough to pay for moving rows.

Rows are gathered expert by expert, so that a gathered slice is still in cache when its GEMM reads it and no (M, D)
copy of the tokens exists. Routing weights multiply the activations before the down projection; the K rows of a token
are then added in a fixed order, in fp32, by one ``embedding_bag`` pass.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F, E experts, K top-k, M = T*K rows sorted by
expert, C rows of one expert.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def sort_rows(top_k_index_TK: Tensor, *, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Sorts the M routed rows by expert; equal experts keep token order, so the result is unique.

    Returns:
        order_M: sorted position -> flat (t*K + k) position.
        inverse_TK: flat position -> sorted position.
        bounds: E + 1 ints; expert e owns sorted rows ``bounds[e]:bounds[e + 1]``.

    Raises:
        IndexError: an index is outside ``[0, E)``.
    """
    sorted_M, order_M = torch.sort(top_k_index_TK.reshape(-1), stable=True)
    edges = torch.arange(experts + 1, device=sorted_M.device, dtype=sorted_M.dtype)
    bounds: list[int] = torch.searchsorted(sorted_M, edges).tolist()
    if bounds[0] != 0 or bounds[-1] != sorted_M.numel():
        raise IndexError(
            f"experts layer: top_k_index must lie in [0, {experts}), got [{int(sorted_M[0])}, {int(sorted_M[-1])}]"
        )
    inverse_M = torch.empty_like(order_M)
    inverse_M[order_M] = torch.arange(order_M.numel(), device=order_M.device)
    return order_M, inverse_M.view(top_k_index_TK.shape), bounds


def _slices(bounds: list[int]) -> Iterator[tuple[int, slice]]:
    for expert in range(len(bounds) - 1):
        yield expert, slice(bounds[expert], bounds[expert + 1])


def _combine(y_MD: Tensor, inverse_TK: Tensor) -> Tensor:
    """(T, D): the sum of each token's K rows, in the order of k, accumulated in fp32 or better."""
    if inverse_TK.numel() == 0:
        return y_MD.new_zeros((inverse_TK.shape[0], y_MD.shape[1]))
    return F.embedding_bag(inverse_TK, y_MD, mode="sum")


def forward(
    x_TD: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """The output (T, D) and the saved pre-activations (M, G) in sorted order, both in the dtype of ``x_TD``."""
    experts, model_dim, width = w2_EDF.shape
    dtype, top_k = x_TD.dtype, top_k_index_TK.shape[1]
    order_M, inverse_TK, bounds = sort_rows(top_k_index_TK, experts=experts)
    token_M = order_M // max(top_k, 1)
    weights_M1 = top_k_weights_TK.reshape(-1)[order_M].to(dtype).unsqueeze(1)
    hidden_MG = x_TD.new_empty((order_M.numel(), 2 * width))
    y_MD = x_TD.new_empty((order_M.numel(), model_dim))
    for expert, rows in _slices(bounds):
        if rows.start == rows.stop:
            continue
        hidden_CG = hidden_MG[rows]
        torch.mm(x_TD.index_select(0, token_M[rows]), w13_EGD[expert].to(dtype).t(), out=hidden_CG)
        act_CF = F.silu(hidden_CG[:, :width]).mul_(hidden_CG[:, width:]).mul_(weights_M1[rows])
        torch.mm(act_CF, w2_EDF[expert].to(dtype).t(), out=y_MD[rows])
    return _combine(y_MD, inverse_TK), hidden_MG


def backward(
    grad_out_TD: Tensor,
    x_TD: Tensor,
    w13_EGD: Tensor,
    w2_EDF: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    hidden: Tensor,
    *,
    need_x: bool,
    need_w13: bool,
    need_w2: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, w13, w2 and the routing weights; None only for those not needed."""
    experts, model_dim, width = w2_EDF.shape
    dtype, top_k = x_TD.dtype, top_k_index_TK.shape[1]
    order_M, inverse_TK, bounds = sort_rows(top_k_index_TK, experts=experts)
    token_M = order_M // max(top_k, 1)
    weights_M1 = top_k_weights_TK.reshape(-1)[order_M].to(dtype).unsqueeze(1)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    rows_x_MD = x_TD.new_empty((order_M.numel(), model_dim)) if need_x else None
    grad_w13_EGD = torch.empty_like(w13_EGD, memory_format=torch.contiguous_format) if need_w13 else None
    grad_w2_EDF = torch.empty_like(w2_EDF, memory_format=torch.contiguous_format) if need_w2 else None
    grad_weights_M = x_TD.new_empty(order_M.numel(), dtype=sum_dtype) if need_weights else None

    for expert, rows in _slices(bounds):
        if rows.start == rows.stop:
            # An empty expert still gets a gradient: a missing one desynchronises data-parallel reductions.
            for grad in (grad_w13_EGD, grad_w2_EDF):
                if grad is not None:
                    grad[expert].zero_()
            continue
        gate_CF, up_CF = hidden[rows].split(width, dim=1)
        grad_out_CD = grad_out_TD.index_select(0, token_M[rows])
        silu_CF = F.silu(gate_CF)
        act_CF = silu_CF * up_CF
        if need_x or need_w13 or need_weights:
            grad_act_CF = grad_out_CD @ w2_EDF[expert].to(dtype)
            if grad_weights_M is not None:
                # <dO, Y> = <dO W2, a>: the gradient of a routing weight needs no expert output.
                torch.sum(grad_act_CF * act_CF, 1, dtype=sum_dtype, out=grad_weights_M[rows])
        if grad_w2_EDF is not None:
            _mm_into(grad_w2_EDF[expert], grad_out_CD.t(), act_CF.mul_(weights_M1[rows]))
        if need_x or need_w13:
            grad_act_CF.mul_(weights_M1[rows])
            grad_hidden_CG = torch.empty_like(hidden[rows])
            torch.mul(grad_act_CF, silu_CF, out=grad_hidden_CG[:, width:])
            torch.ops.aten.silu_backward.grad_input(
                grad_act_CF.mul_(up_CF), gate_CF, grad_input=grad_hidden_CG[:, :width]
            )
            if rows_x_MD is not None:
                torch.mm(grad_hidden_CG, w13_EGD[expert].to(dtype), out=rows_x_MD[rows])
            if grad_w13_EGD is not None:
                _mm_into(grad_w13_EGD[expert], grad_hidden_CG.t(), x_TD.index_select(0, token_M[rows]))

    grad_x_TD = None if rows_x_MD is None else _combine(rows_x_MD, inverse_TK)
    grad_weights_TK = None
    if grad_weights_M is not None:
        grad_weights_TK = grad_weights_M[inverse_TK].to(top_k_weights_TK.dtype)
    return grad_x_TD, grad_w13_EGD, grad_w2_EDF, grad_weights_TK


def _mm_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out = left @ right``, without a temporary where the dtypes agree (they differ under autocast)."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
