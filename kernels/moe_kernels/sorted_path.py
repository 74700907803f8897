"""One GEMM per expert over its own rows: the path for experts wide enough to pay for moving rows.

Rows are gathered in chunks of whole experts, so that they are still in cache when the GEMMs read them and no (M, D)
copy of the tokens exists. The K rows of a token are added in a fixed order, in fp32 or better. Rows past the last
expert (absent experts, padding) are not computed and count as zero.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F, E experts, K top-k, M = T*K rows sorted by
expert, C rows of a chunk.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import Routing
from .sorted_rows import Chunk, Rows

# Below this width the columns of a chunk are contiguous, not its rows; see _block.
_NARROW = 64
_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input


def forward(
    x_TD: Tensor,
    w13: Tensor,
    w3_EFD: Tensor | None,
    w2_EDF: Tensor,
    *,
    weights_TK: Tensor | None,
    routing: Routing,
    keep_hidden: bool = True,
) -> tuple[Tensor, Tensor]:
    """The output (T, D) and the pre-activations (R, G), both in the dtype of ``x_TD``; R is ``hidden_rows``.

    The layout of the pre-activations, :func:`_block`, is for :func:`backward` alone.

    Args:
        x_TD: tokens in the dtype of the GEMMs.
        w13: ``[gate; up]`` (E, 2F, D), or the gate alone (E, F, D) where ``w3_EFD`` is given; any floating dtype.
        w3_EFD: up projections, or None.
        w2_EDF: down projections.
        weights_TK: routing weights; None for rows that came sorted.
        routing: of these tokens; its rows past ``offset_E1[E]`` are skipped.
        keep_hidden: whether the backward will want the pre-activations; those of one chunk at a time exist otherwise,
            and none are returned.
    """
    dtype, (_, model_dim, width) = x_TD.dtype, w2_EDF.shape
    rows = Rows(x_TD, routing, weights_TK=weights_TK, width=width)
    hidden_MG = x_TD.new_empty((rows.total if keep_hidden else rows.most, 2 * width))
    x_scratch, act_scratch = x_TD.new_empty((rows.most, model_dim)), x_TD.new_empty((rows.most, width))
    out = _Sum(x_TD, rows, scratch=x_scratch)
    for chunk in rows.chunks():
        x_CD = chunk.take(x_TD, out=x_scratch)
        start = chunk.start if keep_hidden else 0
        hidden_CG = _block(hidden_MG, start, start + chunk.size, width=width)
        gate_CF, up_CF = hidden_CG.split(width, dim=1)
        for expert, rows_e in chunk.experts:
            x_e = x_CD[rows_e]
            if w3_EFD is None:
                torch.mm(x_e, w13[expert].to(dtype).t(), out=hidden_CG[rows_e])
            else:
                torch.mm(x_e, w13[expert].to(dtype).t(), out=gate_CF[rows_e])
                torch.mm(x_e, w3_EFD[expert].to(dtype).t(), out=up_CF[rows_e])
        act_CF = _silu(gate_CF, out=_block(act_scratch, 0, chunk.size, width=width)).mul_(up_CF)
        if out.adds:
            chunk.scale(act_CF)
        y_CD = out.block(chunk)
        for expert, rows_e in chunk.experts:
            torch.mm(act_CF[rows_e], w2_EDF[expert].to(dtype).t(), out=y_CD[rows_e])
        out.add(chunk, y_CD)
    return out.result(weights_TK), hidden_MG if keep_hidden else x_TD.new_empty(0)


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
    dtype, (_, model_dim, width) = x_TD.dtype, w2_EDF.shape
    rows = Rows(x_TD, routing, weights_TK=weights_TK, width=width)
    grad_w13 = _gradient_like(w13, rows) if need_w13 else None
    grad_w3_EFD = _gradient_like(w3_EFD, rows) if need_w13 and w3_EFD is not None else None
    grad_w2_EDF = _gradient_like(w2_EDF, rows) if need_w2 else None
    row_scratch = x_TD.new_empty((rows.most, model_dim))
    scratch = [x_TD.new_empty((rows.most, width)) for _ in range(2)]
    scratch.append(x_TD.new_zeros((rows.most, 2 * width)))  # transposed, it is the left of a product; see Rows.most
    grad_x = _Sum(x_TD, rows, scratch=row_scratch) if need_x else None
    grad_weights_M = x_TD.new_zeros(rows.total, dtype=torch.promote_types(dtype, torch.float32))

    for chunk in rows.chunks():
        gate_CF, up_CF = _block(hidden_MG, chunk.start, chunk.stop, width=width).split(width, dim=1)
        product_CF, grad_act_CF, grad_hidden_CG = (_block(buffer, 0, chunk.size, width=width) for buffer in scratch)
        grad_gate_CF, grad_up_CF = grad_hidden_CG.split(width, dim=1)
        grad_out_CD = chunk.take(grad_out_TD, out=row_scratch)
        # The activations use the buffers of their gradients until those are computed: two buffers less in cache.
        silu_CF = _silu(gate_CF, out=grad_up_CF)
        act_CF = torch.mul(silu_CF, up_CF, out=grad_gate_CF)
        if need_x or need_w13 or need_weights:
            for expert, rows_e in chunk.experts:
                torch.mm(grad_out_CD[rows_e], w2_EDF[expert].to(dtype), out=grad_act_CF[rows_e])
            if need_weights:
                # <dO, Y> = <dO W2, a>: the gradient of a routing weight needs no expert output.
                torch.mul(grad_act_CF, act_CF, out=product_CF)
                torch.sum(product_CF, 1, dtype=grad_weights_M.dtype, out=grad_weights_M[chunk.start : chunk.stop])
        if grad_w2_EDF is not None:
            chunk.scale(act_CF)
            for expert, rows_e in chunk.experts:
                _mm_into(grad_w2_EDF[expert], grad_out_CD[rows_e].t(), act_CF[rows_e])
        if need_x or need_w13:
            chunk.scale(grad_act_CF)
            torch.mul(grad_act_CF, silu_CF, out=grad_up_CF)
            _silu_backward(grad_act_CF.mul_(up_CF), gate_CF, grad_input=grad_gate_CF)
        if grad_x is not None:
            grad_x_CD = grad_x.block(chunk)
            for expert, rows_e in chunk.experts:
                if w3_EFD is None:
                    torch.mm(grad_hidden_CG[rows_e], w13[expert].to(dtype), out=grad_x_CD[rows_e])
                else:
                    torch.mm(grad_gate_CF[rows_e], w13[expert].to(dtype), out=grad_x_CD[rows_e])
                    grad_x_CD[rows_e].addmm_(grad_up_CF[rows_e], w3_EFD[expert].to(dtype))
            grad_x.add(chunk, grad_x_CD)
        if grad_w13 is not None:
            x_CD = chunk.take(x_TD, out=row_scratch)
            for expert, rows_e in chunk.experts:
                if grad_w3_EFD is None:
                    _mm_into(grad_w13[expert], grad_hidden_CG[rows_e].t(), x_CD[rows_e])
                else:
                    _mm_into(grad_w13[expert], grad_gate_CF[rows_e].t(), x_CD[rows_e])
                    _mm_into(grad_w3_EFD[expert], grad_up_CF[rows_e].t(), x_CD[rows_e])

    grad_x_TD = None if grad_x is None else grad_x.result()
    grad_weights_TK = None
    if need_weights and weights_TK is not None:
        grad_weights_TK = grad_weights_M[rows.inverse_TK].to(weights_TK.dtype)
    return grad_x_TD, grad_w13, grad_w3_EFD, grad_w2_EDF, grad_weights_TK


class _Sum:
    """``out[t]`` = the sum of the K rows of token t, in a fixed order, in fp32 or better.

    In fp32 and fp64 each block is added while it is in cache. Half precision needs a wider sum than its rows: there
    the blocks are kept, (M, D), and added at the end by one ``embedding_bag``. Rows that came sorted are the output.
    """

    def __init__(self, x_TD: Tensor, rows: Rows, *, scratch: Tensor) -> None:
        self.inverse_TK, self.end, self.scratch = rows.inverse_TK, rows.bounds[-1], scratch
        self.adds = rows.token_M is not None and x_TD.dtype.itemsize >= 4
        if self.adds:
            self.out = torch.zeros_like(x_TD, memory_format=torch.contiguous_format)
        else:
            self.out = x_TD.new_empty((rows.total, x_TD.shape[1]))
            self.out[self.end :].zero_()

    def block(self, chunk: Chunk) -> Tensor:
        """Where the rows of a chunk go before :meth:`add`; may be ``scratch``."""
        return self.scratch[: chunk.size] if self.adds else self.out[chunk.start : chunk.stop]

    def add(self, chunk: Chunk, y_CD: Tensor) -> None:
        if self.adds and chunk.token_C is not None:
            self.out.index_add_(0, chunk.token_C, y_CD)

    def result(self, weights_TK: Tensor | None = None) -> Tensor:
        """The sum, of rows times ``weights_TK`` where blocks are kept: the product costs nothing there."""
        if self.adds or self.inverse_TK is None:
            return self.out
        if self.inverse_TK.numel() == 0:
            return self.out.new_zeros((self.inverse_TK.shape[0], self.out.shape[1]))
        if weights_TK is not None:
            weights_TK = weights_TK.to(self.out.dtype).contiguous()
            if self.end < self.out.shape[0]:  # or the weight of an absent expert would be read, and might be NaN
                weights_TK = weights_TK.masked_fill(self.inverse_TK >= self.end, 0)
        return F.embedding_bag(self.inverse_TK, self.out, mode="sum", per_sample_weights=weights_TK)


def _block(buffer_MX: Tensor, start: int, stop: int, *, width: int) -> Tensor:
    """Rows ``start:stop`` (C, X) of a buffer, which is laid out (X, M) where experts are narrow.

    An elementwise operator takes the tail of each contiguous run one element at a time: of a row of F = 24, all of it.
    All chunks share the stride of the buffer, because oneDNN compiles a kernel for every stride it meets.
    """
    if width >= _NARROW:
        return buffer_MX[start:stop]
    return buffer_MX.view(buffer_MX.shape[1], -1)[:, start:stop].t()


def _gradient_like(weight: Tensor, rows: Rows) -> Tensor:
    """An unwritten gradient, zero for the experts without rows."""
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert, (start, stop) in enumerate(pairwise(rows.bounds)):
        if start == stop:
            grad[expert].zero_()
    return grad


def _mm_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out = left @ right``, without a temporary where the dtypes agree (they differ under autocast)."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
