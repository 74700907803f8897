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
    experts = w2_EDF.shape[0]
    rows = zip(x_TD.split(1), in_range(index_TK, experts=experts).tolist(), weights_TK.tolist(), strict=True)
    out_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for out_1D, (x_1D, index_K, weight_K) in zip(out_TD.split(1), rows, strict=True):
        for expert, weight in zip(index_K, weight_K, strict=True):
            if expert < experts:
                gate_1F, up_1F = F.linear(x_1D, w13_EGD[expert]).chunk(2, dim=1)
                act_1F = F.silu(gate_1F).mul_(up_1F)
                out_1D.add_(F.linear(act_1F, w2_EDF[expert]), alpha=weight)
    return out_TD.to(x_TD.dtype)
