"""How a dense child and its masks are trained, from a pipeline's settings alone."""

from __future__ import annotations

from tasks.settings import Pretrain
from tasks.settings.pretrain import Balance

_ROUTED = {"router", "experts", "shared"}
"""Parts of a sparse model that a dense one has not."""
MASK_RATE = 1.0
"""Peak learning rate of masks (arXiv 2310.06694, its code): a logit may go from limit to limit in twelve steps."""
_WARMUP = 10
"""A tenth of the steps of mask training is warm-up."""


def training(params: Pretrain) -> Pretrain:
    """The settings of the child's training, by those of the sparse model's.

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


def masks(params: Pretrain, *, tokens: int) -> Pretrain:
    """The settings of the training of masks, by those of the sparse model's.

    The parent is trained with its masks, on cross-entropy alone, at the child's rates. The schedule is Sheared
    LLaMA's: cosine after a warm-up of a tenth, no weight decay. Another seed gives other batches than the child's.
    """
    dense = training(params)
    return dense.model_copy(
        update={
            "tokens": tokens,
            "warmup_tokens": tokens // _WARMUP,
            "schedule": "cosine",
            "final_lr_share": 0.1,
            "weight_decay": 0.0,
            "learning_rates": {**dense.learning_rates, "masks": MASK_RATE},
            "distill": None,
            "dynamic": None,
            "seed": (params.seed + 1) % (1 << 32),
        }
    )
