"""One or two tokens without gradients, row after row: the path that generates text on a CPU.

With so few rows there is nothing to gather, sort or batch: a row reads the weights of its expert once, and the rest is
the cost of calling operators. So no routing is built and there is no custom operator in between.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import in_range

# Above, the GEMMs of :mod:`moe_kernels.sorted_path` over the rows of each expert are faster.
_TOKENS, _ROWS = 2, 8


def fits(x_TD: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, *, top_k: int) -> bool:
    """True for one or two tokens of few experts each, on a CPU, with weights of the dtype of ``x_TD``."""
    return (
        0 < len(x_TD) <= _TOKENS
        and 0 < len(x_TD) * top_k <= _ROWS
        and x_TD.device.type == "cpu"
        and x_TD.dtype == w13_EGD.dtype == w2_EDF.dtype
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def forward(x_TD: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, *, weights_TK: Tensor, index_TK: Tensor) -> Tensor:
    """The output (T, D) in the dtype of ``x_TD``; the K rows of a token are added in order, in fp32 or better.

    An index of E names an absent expert, which adds nothing.

    Raises:
        IndexError: an index is outside ``[0, E]``.
    """
    experts, index = w2_EDF.shape[0], index_TK.tolist()
    if not all(0 <= expert <= experts for row in index for expert in row):
        in_range(index_TK, experts=experts)  # raises
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    rows = []
    for x_1D, index_K, weight_K in zip(x_TD.split(1), index, weights_TK.tolist(), strict=True):
        out_1D = None
        for expert, weight in zip(index_K, weight_K, strict=True):
            if expert < experts:
                gate_1F, up_1F = F.linear(x_1D, w13_EGD[expert]).chunk(2, dim=1)
                y_1D = F.linear(F.silu(gate_1F).mul_(up_1F), w2_EDF[expert])
                out_1D = y_1D.to(dtype).mul_(weight) if out_1D is None else out_1D.add_(y_1D, alpha=weight)
        rows.append(torch.zeros_like(x_1D, dtype=dtype) if out_1D is None else out_1D)
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(x_TD.dtype)
