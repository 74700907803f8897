"""The reference of a dropless top-k SwiGLU experts layer, short enough to check by eye.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F (gate rows, then up rows), E experts, K top-k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def experts_reference(
    x_TD: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
) -> Tensor:
    """``out[t] = sum_k s[t,k] * W2[e] (silu(Wgate[e] x[t]) * (Wup[e] x[t]))`` with ``e = top_k_index[t,k]``.

    Slow and differentiable, in any floating dtype (the tests compare with fp64). Routing weights need not sum
    to one, and a token may name an expert twice.

    Args:
        x_TD: tokens, (T, D).
        w13_EGD: ``[gate; up]`` projections, (E, 2F, D): the layout of transformers 5.
        w2_EDF: down projections, (E, D, F).
        top_k_index_TK: chosen experts, integers in ``[0, E)``, (T, K).
        top_k_weights_TK: routing weights, (T, K).

    Returns:
        (T, D) in the dtype of ``x_TD``.

    Source: Shazeer et al. 2017 (arXiv 1701.06538) eq. 1 with the SwiGLU expert of Shazeer 2020 (arXiv 2002.05202).
    """
    out_TD = torch.zeros_like(x_TD)
    for expert, (w13_GD, w2_DF) in enumerate(zip(w13_EGD.unbind(0), w2_EDF.unbind(0), strict=True)):
        gate_TF, up_TF = F.linear(x_TD, w13_GD).chunk(2, dim=-1)
        y_TD = F.linear(F.silu(gate_TF) * up_TF, w2_DF)
        weight_T = (top_k_weights_TK * (top_k_index_TK == expert)).sum(-1)
        out_TD = out_TD + (weight_T[:, None] * y_TD).to(x_TD.dtype)
    return out_TD
