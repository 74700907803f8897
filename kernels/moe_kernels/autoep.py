"""The seam of DeepSpeed's expert parallelism (AutoEP), which hands each rank rows already sorted by local expert.

DeepSpeed sends the rows to the ranks of their experts, sorts them there and pads: zero rows after those of each expert
up to a multiple of 8, counted as rows of the expert, and further rows past the sum of the counts. The first kind
computes to zero; the second is not computed at all.

Shapes: M rows, D hidden, F width of one expert, E experts of this rank.
"""

import functools
from typing import Any

from torch import Tensor, nn

from moe_kernels.experts import experts_sorted


def use_in_deepspeed(model: nn.Module) -> int:
    """Computes the experts of DeepSpeed's AutoEP by this package, from now on; calling it again changes nothing.

    Call it after ``deepspeed.initialize``, which builds those experts. Parameters and state dict stay as they are.

    Args:
        model: a DeepSpeed engine or its module, of ``expert_parallel: {enabled: true}``.

    Returns:
        How many ``GroupedExperts`` the model has; all are computed here.

    Raises:
        ValueError: the model has none.
        NotImplementedError: one of them computes something else than SwiGLU; none is changed then.
    """
    from deepspeed.moe.ep_experts import GroupedExperts

    found: dict[str, Any] = {name: each for name, each in model.named_modules() if isinstance(each, GroupedExperts)}
    if not found:
        raise ValueError(
            f"use_in_deepspeed: {type(model).__name__} has no GroupedExperts; call it after deepspeed.initialize, "
            'with expert_parallel: {"enabled": true} in the configuration'
        )
    for name, module in found.items():
        reason = None
        if module.activation != "swiglu":
            reason = f"its activation is {module.activation!r}, and only 'swiglu' is supported"
        elif type(module).forward is not GroupedExperts.forward:
            reason = f"{type(module).__name__} overrides forward"
        if reason is not None:
            raise NotImplementedError(f"use_in_deepspeed: cannot run {name}: {reason}; leave this model to DeepSpeed")
    for module in found.values():
        module.forward = functools.partial(_forward, module)
    return len(found)


def _forward(module: Any, x_MD: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    return experts_sorted(x_MD, module.w1, module.w2, num_tokens_per_expert, w3_EFD=module.w3)
