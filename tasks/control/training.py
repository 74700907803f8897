"""How a dense model is trained on the batches of a sparse one, from a pipeline's settings alone."""

from __future__ import annotations

from tasks.settings import Pretrain
from tasks.settings.pretrain import Balance

_ROUTED = {"router", "experts", "shared"}
"""Parts of a sparse model that a dense one has not."""


def dense(params: Pretrain) -> Pretrain:
    """The settings of the pruned baseline's training, by those of the sparse model's.

    Tokens, batches, schedule, precision and distillation are the same. Router, balance and noise have no place. All
    parameters are trained in every step, also while a phase of the sparse model trains its router alone. The FFN
    learns at the rate of the experts that were cut from it.
    """
    rates = {part: rate for part, rate in params.learning_rates.items() if part not in _ROUTED}
    if "experts" in params.learning_rates:
        rates["ffn"] = params.learning_rates["experts"]
    return params.model_copy(
        update={
            "learning_rates": rates,
            "train": "all",
            "balance": Balance(loss="none"),
            "noise": False,
            "expert_parallel": 1,
        }
    )
