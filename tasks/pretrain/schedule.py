"""The learning rate as a pure function of the step: nothing of it needs to be saved."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.settings import Pretrain


def share(step: int, params: Pretrain) -> float:
    """Share of the peak learning rate for optimizer step `step` (1 to params.steps).

    Linear from peak/warmup at step 1 to the peak at step `warmup_steps`. From there down to f = `final_lr_share` in
    the last step, where p is the share of that way that is behind:

    cosine: f + (1 - f) (1 + cos(pi p)) / 2. It reaches its floor at the last step, not before: LLaMA-MoE's clipped
        cosine is flat from 80 % on.
    wsd: the peak, until `decay_share` of all steps is left; over these f + (1 - f) (1 - sqrt(p)), which reaches a
        lower loss than a linear decay of the same length (arXiv 2405.18392).
    linear: f + (1 - f) (1 - p).
    constant: the peak.
    """
    steps, warmup, final = params.steps, params.warmup_steps, params.final_lr_share
    if step <= warmup:
        return step / warmup
    if params.schedule == "constant":
        return 1.0
    decay = steps - warmup
    if params.schedule == "wsd":
        decay = _wsd_decay(params)
        if step <= steps - decay:
            return 1.0
    progress = (step - (steps - decay)) / max(1, decay)
    if params.schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if params.schedule == "linear":
        return final + (1 - final) * (1 - progress)
    return final + (1 - final) * (1 - math.sqrt(progress))


def stable(params: Pretrain) -> int | None:
    """The last step up to which a run with more tokens is the same; None where the first already differs.

    With `constant` it is the one before the last, after which a run is evaluated that a longer one is not.
    """
    last = {"wsd": params.steps - _wsd_decay(params), "constant": params.steps - 1}.get(params.schedule, 0)
    return last or None


def _wsd_decay(params: Pretrain) -> int:
    """Steps over which `wsd` decays."""
    return min(params.steps - params.warmup_steps, max(1, round(params.decay_share * params.steps)))
