"""The end of an optimizer step: taken, or given up without a trace."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_FIRST_MICRO_STEP = {1: -1, 2: -1, 3: 0}
"""What DeepSpeed's count of micro-batches stands at before the first one, by ZeRO stage."""


def finish(engine: DeepSpeedEngine) -> float:
    """Take the optimizer step after the last micro-batch's backward pass, if the gradient is finite.

    Returns:
        The norm of the whole gradient before clipping, the same on every rank. If it is not finite, weights and
        optimizer are as they were, and the gradients are forgotten.
    """
    import torch

    norm = None
    if not engine.zero_optimization() and not engine.bfloat16_enabled():  # the one case where DeepSpeed has no norm
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            discard(engine)
            return norm
    engine.step()
    if not engine.was_step_applied():
        discard(engine)  # with offload, DeepSpeed would add the next gradients to these
        return float("nan")
    return float(engine.get_global_grad_norm()) if norm is None else norm


def discard(engine: DeepSpeedEngine) -> None:
    """Forget the gradients of this optimizer step's micro-batches: the next one begins as if they had not been.

    All ranks call it after a backward pass, at any micro-batch, and before `finish`.
    """
    optimizer = engine.optimizer
    engine.zero_grad()
    if hasattr(optimizer, "micro_step_id"):  # ZeRO 1, 2 and 3 keep sums of their own
        optimizer.zero_grad()
        optimizer.micro_step_id = _FIRST_MICRO_STEP[engine.zero_optimization_stage()]
        optimizer.reset_cpu_buffers()
        for sums in (optimizer.averaged_gradients, getattr(optimizer, "all_grad_tensors", {})):
            sums.update(dict.fromkeys(sums))
    elif engine.bfloat16_enabled():
        optimizer.zero_grad()
    engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()
