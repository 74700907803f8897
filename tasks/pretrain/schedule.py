"""The learning rate as a pure function of the step: nothing of it needs to be saved."""

from __future__ import annotations

import math


def share(step: int, *, steps: int, warmup: int, final: float) -> float:
    """Share of the peak learning rate for optimizer step `step` (1 to steps).

    Linear from peak/warmup at step 1 to the peak at step `warmup`, then half a cosine down to `final` at step `steps`.
    The cosine reaches its floor at the last step, not before: LLaMA-MoE's clipped cosine is flat from 80 % on.
    """
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
