"""What training had cost at each of its evaluations, beside the loss there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tasks.pretrain.log import meters

if TYPE_CHECKING:
    from tasks.settings import Pretrain


def flops(config: Any, params: Pretrain, *, step: int) -> int:
    """FLOPs of training up to a step, forward and backward, by what each phase trains; as `meters` counts them."""
    total, before = 0, 0
    for last, what in params.phases:
        if steps := min(last, step) - before:
            total += steps * params.step_tokens * meters.flops(config, seq_len=params.seq_len, what=what)
        before = min(last, step)
    return total


def points(records: Iterable[dict[str, Any]], *, config: Any, params: Pretrain) -> dict[str, list[float]]:
    """The curve of a run.

    Args:
        records: of its log, in order.
        config: of the model that is trained, an object or a dict.
        params: the settings of the training.

    Returns:
        {step, tokens, flops, seconds, loss: a value for each evaluation}. seconds: those of the steps until then,
        without evaluations and checkpoints; absent if the log has no timings. loss: the mean over the domains. Steps
        that were undone or repeated count once.
    """
    curve: dict[str, list[float]] = {name: [] for name in ("step", "tokens", "flops", "seconds", "loss")}
    seconds, timed = 0.0, True
    for record in records:
        if record["kind"] == "step":
            timed = timed and "timing" in record
            seconds += record["timing"]["seconds"] if timed else 0.0
        elif record["kind"] == "validation":
            curve["step"].append(record["step"])
            curve["tokens"].append(record["tokens"])
            curve["flops"].append(flops(config, params, step=record["step"]))
            curve["seconds"].append(round(seconds, 3))
            curve["loss"].append(record["mean"])
    return curve if timed else {name: values for name, values in curve.items() if name != "seconds"}
