"""A made-up log of a training run, its model and its settings."""

from __future__ import annotations

from typing import Any

from tasks.settings import Pretrain

COLUMNS = {"step": [0, 1, 2], "tokens": [0, 10, 20], "flops": [0, 70, 140], "seconds": [0.0, 1.0, 2.0]}
"""Of a curve in the metrics of a run; the loss is missing."""
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = {**SIZES, "model_type": "mixtral", "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 1}


def training(**knobs: Any) -> Pretrain:
    return Pretrain(tokens=640, seq_len=16, batch=4, learning_rate=1e-3, warmup_tokens=0, eval_tokens=128, **knobs)


def records(*, timed: bool) -> list[dict[str, Any]]:
    """Ten steps of 64 tokens, the n-th of n seconds, with evaluations at 0, 4 and 10, and an event."""
    log: list[dict[str, Any]] = []
    for step in range(11):
        if step:
            timing = {"timing": {"seconds": float(step)}} if timed else {}
            log.append({"kind": "step", "step": step, "tokens": 64 * step, **timing})
        if step in (0, 4, 10):
            log.append({"kind": "validation", "step": step, "tokens": 64 * step, "mean": 4.0 - step / 10})
    return [*log, {"kind": "event", "step": 10, "what": "skip", "message": ""}]
