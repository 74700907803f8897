"""Whether a side computes the layer: its output and its four gradients against a reference.

The reference is computed in fp32 (sums of T*K*D products are then exact to about 1e-6, four orders below what half
precision rounds away), without TF32, one expert after the other: all tokens are compared, not a sample, it costs 3 x
the FLOPs of nothing but the routed rows, and only one expert's operands are ever widened. fp64 would cost the same on
an H100 and 30 to 60 x as much on a card without fp64 tensor cores.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, C rows of one expert.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.shapes import Problem

NAMES = ("out", "x gradient", "w13 gradient", "w2 gradient", "routing weight gradient")


def reference(p: Problem, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and gradients in the order of :data:`NAMES`, in ``dtype``."""
    out_TD, grad_x_TD = (torch.zeros_like(p.x_TD, dtype=dtype) for _ in range(2))
    grad_w13_EGD, grad_w2_EDF, grad_weights_TK = (
        torch.zeros_like(t, dtype=dtype) for t in (p.w13_EGD, p.w2_EDF, p.weights_TK)
    )
    for expert in range(p.shape.experts):
        token_C, slot_C = (p.index_TK == expert).nonzero(as_tuple=True)
        operands = (p.x_TD[token_C], p.w13_EGD[expert], p.w2_EDF[expert], p.weights_TK[token_C, slot_C])
        x_CD, w13_GD, w2_DF, weight_C = leaves = [t.detach().to(dtype).requires_grad_() for t in operands]
        gate_CF, up_CF = F.linear(x_CD, w13_GD).chunk(2, dim=-1)
        y_CD = weight_C[:, None] * F.linear(F.silu(gate_CF) * up_CF, w2_DF)
        grads = torch.autograd.grad(y_CD, leaves, p.grad_out_TD[token_C].to(dtype))
        out_TD.index_add_(0, token_C, y_CD.detach())
        grad_x_TD.index_add_(0, token_C, grads[0])
        grad_w13_EGD[expert], grad_w2_EDF[expert] = grads[1], grads[2]
        grad_weights_TK[token_C, slot_C] = grads[3]
    return [out_TD, grad_x_TD, grad_w13_EGD, grad_w2_EDF, grad_weights_TK]


def limit(dtype: torch.dtype) -> float:
    """The largest relative error of a side that is believed: 2.5 eps of its dtype.

    Rounding hidden, activations and rows to that dtype gives half an eps to one; a wrong result is off by far more.
    """
    return 2.5 * torch.finfo(dtype).eps


def disagreement(got: Sequence[Tensor], expected: Sequence[Tensor], *, dtype: torch.dtype) -> tuple[float, str | None]:
    """The largest relative error of the five, and what to say of it where it is past :func:`limit`."""
    worst, at = 0.0, ""
    for name, tensor, exact in zip(NAMES, got, expected, strict=True):
        if tensor.shape != exact.shape:
            return float("inf"), f"its {name} has shape {tuple(tensor.shape)}, not {tuple(exact.shape)}"
        error = relative_error(tensor, exact)
        if error > worst:
            worst, at = error, name
    if worst <= limit(dtype):
        return worst, None
    said = f"off by {worst:.1e} (limit {limit(dtype):.1e})" if math.isfinite(worst) else "not finite"
    return worst, f"its {at} is {said}"


def relative_error(tensor: Tensor, exact: Tensor) -> float:
    """Of the norms, infinite for a NaN; slice by slice, so that no second tensor of that size is made."""
    slices = zip(tensor.chunk(64), exact.chunk(64), strict=True)
    square = torch.stack([(got.to(want.dtype) - want).norm().double().square() for got, want in slices]).sum()
    error = (square.sqrt() / exact.norm().double().clamp(min=1e-30)).item()
    return math.inf if math.isnan(error) else error
