"""From router logits to chosen experts and routing weights: the variants that published models use.

| scoring                | normalise | weights of the chosen set S                       | used by            |
|------------------------|-----------|---------------------------------------------------|--------------------|
| ``top_k_then_softmax`` | always    | softmax over S                                    | Mixtral, LLaMA-MoE |
| ``softmax_then_top_k`` | yes       | softmax over E, divided by its sum in S: the same | Qwen3-MoE          |
| ``softmax_then_top_k`` | no        | softmax over E                                    | OLMoE, Switch      |
| ``sigmoid``            | yes or no | sigmoid, divided by its sum in S or not           | DeepSeek-V3        |

Gradients are autograd's; :func:`moe_kernels.reference.router_gradient_reference` has them in closed form.

Shapes: T tokens, E experts, K top-k.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Scoring = Literal["softmax_then_top_k", "top_k_then_softmax", "sigmoid"]
_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax_then_top_k": lambda z_TE: z_TE.softmax(-1),
    "top_k_then_softmax": lambda z_TE: z_TE,
    "sigmoid": torch.sigmoid,
}


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: Scoring,
    normalise: bool = True,
    bias_E: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The K experts of each token, best first, and their weights.

    Computed in fp32 (fp64 for fp64 logits) whatever the dtype of the logits, under autocast too. Of experts with equal
    scores the lower one wins, on every device. With ``top_k_then_softmax`` and K = 1 every weight is 1, and the router
    gets no gradient.

    Args:
        logits_TE: router logits, (T, E), floating. Their values are not checked, which would stall a device: a NaN
            counts as the largest, and makes the weights of its token NaN.
        top_k: K, in ``[1, E]``.
        scoring: how logits become scores, see the table above.
        normalise: whether the K weights of a token sum to ``scale``.
        bias_E: added to the scores (to the logits with ``top_k_then_softmax``) to choose the experts, and to nothing
            else; it gets no gradient. DeepSeek-V3's balancing without an auxiliary loss (arXiv 2408.15664).
        scale: constant factor of the weights: LLaMA-MoE's score_scale_factor, DeepSeek-V3's routed_scaling_factor.

    Returns:
        index_TK: (T, K) int64; it carries no gradient.
        weights_TK: (T, K), fp32 or fp64.

    Raises:
        ValueError: a shape, ``top_k`` or ``scoring`` does not fit, or ``normalise=False`` with ``top_k_then_softmax``.

    Source: Mixtral (arXiv 2401.04088) 2.1; OLMoE (2409.02060) 2; DeepSeek-V3 (2412.19437) eq. 12 to 16.
    """
    _check(logits_TE, top_k, scoring=scoring, normalise=normalise, bias_E=bias_E)
    z_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    with torch.no_grad():
        choice_TE = z_TE
        if bias_E is not None:
            # Without a bias the logits themselves choose: they tell apart what a score rounds to the same number.
            choice_TE = _SCORES[scoring](z_TE) + bias_E
        # A stable sort, not topk, which leaves the order of equals to the device.
        index_TK = torch.sort(choice_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen_TK = z_TE.gather(1, index_TK)
    if scoring == "sigmoid":
        weights_TK = chosen_TK.sigmoid()
        if normalise:
            # They can all round to zero; DeepSeek-V3 adds the same constant.
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    elif normalise:
        weights_TK = chosen_TK.softmax(-1)
    else:
        weights_TK = z_TE.softmax(-1).gather(1, index_TK)
    return index_TK, weights_TK * scale


def _check(logits_TE: Tensor, top_k: int, *, scoring: str, normalise: bool, bias_E: Tensor | None) -> None:
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        raise ValueError(
            f"route: logits must be floating numbers (T, E), got {logits_TE.dtype} {tuple(logits_TE.shape)}; "
            "flatten batch and sequence into T"
        )
    experts = logits_TE.shape[1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"route: top_k must lie in [1, {experts}], the number of experts, got {top_k}")
    if scoring not in _SCORES:
        raise ValueError(f"route: scoring must be one of {', '.join(_SCORES)}, got {scoring!r}")
    if scoring == "top_k_then_softmax" and not normalise:
        raise ValueError(
            "route: normalise=False has no meaning with scoring='top_k_then_softmax', whose weights sum to one; "
            "use scoring='softmax_then_top_k' for the un-normalised softmax"
        )
    if bias_E is not None and tuple(bias_E.shape) != (experts,):
        raise ValueError(f"route: bias has shape {tuple(bias_E.shape)}, expected ({experts},), one number an expert")
