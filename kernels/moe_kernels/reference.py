"""The oracle: what a dropless top-k SwiGLU experts layer, its router and the gradient of the router compute, in lines
that anyone can check by eye.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F (gate rows, then up rows), E experts, K top-k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def experts_reference(
    x_TD: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
) -> Tensor:
    """``out[t] = sum_k s[t,k] * W2[e] (silu(Wgate[e] x[t]) * (Wup[e] x[t]))`` with ``e = top_k_index[t,k]``.

    Slow and differentiable, in any floating dtype (fp64 is the yardstick of the tests). Routing weights need not sum
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


def router_reference(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: str,
    normalise: bool = True,
    bias_E: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The chosen experts and their weights, token by token; arguments and returns as :func:`moe_kernels.router.route`.

    In the dtype of the logits. With S the K experts of highest score plus bias, the lower one of equals, and z the
    logits of one token:

        top_k_then_softmax   s_i = exp(z_i) / sum_S exp(z)
        softmax_then_top_k   s_i = exp(z_i) / sum_E exp(z)
        sigmoid              s_i = 1 / (1 + exp(-z_i))
        normalise            s_i / sum_S s
    """
    chosen, weights = [], []
    bias = [0.0] * logits_TE.shape[1] if bias_E is None else bias_E.tolist()
    for z_E in logits_TE:
        exp_E = (z_E - z_E.max()).exp()
        if scoring == "sigmoid":
            score_E = choice_E = 1 / (1 + (-z_E).exp())
        elif scoring == "softmax_then_top_k":
            score_E = choice_E = exp_E / exp_E.sum()
        else:
            score_E, choice_E = exp_E, z_E
        choice = [score + b for score, b in zip(choice_E.tolist(), bias, strict=True)]
        best = sorted(range(len(choice)), key=lambda expert: (-choice[expert], expert))[:top_k]
        s_K = score_E[best]
        chosen.append(best)
        weights.append(scale * (s_K / s_K.sum() if normalise else s_K))
    return torch.tensor(chosen), torch.stack(weights)


def router_gradient_reference(
    logits_TE: Tensor,
    index_TK: Tensor,
    grad_weights_TK: Tensor,
    *,
    scoring: str,
    normalise: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """The gradient of the logits, in closed form, from that of the weights.

    With S the chosen set, g the gradient of the weights times ``scale``, and s the weights before ``scale``:

        normalised softmax   dz_i = s_i (g_i - sum_S s g)                                 for i in S, else 0
        softmax              dz_i = p_i (g_i - sum_S p g) in S, -p_i sum_S p g outside    p the softmax over E
        sigmoid              dz_i = g_i s_i (1 - s_i)                                     for i in S, else 0
        normalised sigmoid   dz_i = s_i (1 - sigmoid(z_i)) (g_i - sum_S s g)              for i in S, else 0

    Args:
        logits_TE: router logits, (T, E).
        index_TK: chosen experts, distinct within a token, (T, K).
        grad_weights_TK: gradient of the weights, (T, K).
        scoring, normalise, scale: as :func:`moe_kernels.router.route`.

    Returns:
        (T, E) in the dtype of the logits.
    """
    in_S_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, 1.0)
    g_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, scale * grad_weights_TK.to(logits_TE.dtype))
    sigmoid_TE = logits_TE.sigmoid()
    p_TE = sigmoid_TE if scoring == "sigmoid" else logits_TE.softmax(-1)
    if scoring == "sigmoid" and not normalise:
        return g_TE * p_TE * (1 - p_TE)
    if not normalise:
        return p_TE * (g_TE - (p_TE * g_TE).sum(-1, keepdim=True))
    s_TE = in_S_TE * p_TE / (in_S_TE * p_TE).sum(-1, keepdim=True)
    slope_TE = 1 - sigmoid_TE if scoring == "sigmoid" else 1
    return slope_TE * s_TE * (g_TE - (s_TE * g_TE).sum(-1, keepdim=True))
