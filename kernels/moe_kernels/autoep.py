"""Computes the experts of DeepSpeed's expert parallelism (AutoEP).

DeepSpeed sends the rows to the ranks of their experts, sorts them by local expert and pads them: zero rows after those
of each expert up to a multiple of 8, which count as rows of the expert, and rows past the sum of the counts. The
former compute to zero; the latter are not computed.

Shapes: M rows, D hidden, F width of one expert, E experts of this rank.
"""

import functools
from typing import Any

from torch import Tensor, nn

from moe_kernels.experts import experts_sorted


def use_in_deepspeed(model: nn.Module) -> int:
    """Makes this package compute the experts of DeepSpeed's AutoEP; calling it again changes nothing.

    Call it after ``deepspeed.initialize``, which builds those experts. Parameters and state dict stay as they are.

    Args:
        model: a DeepSpeed engine or its module, of ``expert_parallel: {enabled: true}``.

    Returns:
        How many ``GroupedExperts`` the model has; all are computed here.

    Raises:
        ValueError: the model has none.
        NotImplementedError: one of them computes something other than SwiGLU; then none is changed.
    """
    from deepspeed.moe.ep_experts import GroupedExperts

    experts: dict[str, Any] = {name: each for name, each in model.named_modules() if isinstance(each, GroupedExperts)}
    if not experts:
        raise ValueError(
            f"use_in_deepspeed: {type(model).__name__} has no GroupedExperts; call it after deepspeed.initialize, "
            'with expert_parallel: {"enabled": true} in the configuration'
        )
    for name, module in experts.items():
        reason = None
        if module.activation != "swiglu":
            reason = f"its activation is {module.activation!r}, and only 'swiglu' is supported"
        elif type(module).forward is not GroupedExperts.forward:
            reason = f"{type(module).__name__} overrides forward"
        if reason is not None:
            raise NotImplementedError(f"use_in_deepspeed: cannot run {name}: {reason}; leave this model to DeepSpeed")
    for module in experts.values():
        module.forward = functools.partial(_forward, module)
    return len(experts)


def _forward(module: Any, x_MD: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    return experts_sorted(x_MD, module.w1, module.w2, num_tokens_per_expert, w3_EFD=module.w3)
