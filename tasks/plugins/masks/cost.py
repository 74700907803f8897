"""How masks are trained, and so what their training costs, from a pipeline's settings alone."""

from __future__ import annotations

from typing import Any

from tasks.control import training
from tasks.settings import Pipeline, Pretrain
from tasks.settings.pretrain import FIXED

MASK_RATE = 1.0
"""Peak learning rate of masks (arXiv 2310.06694, its code): a logit may go from limit to limit in twelve steps."""
_WARMUP = 10
"""A tenth of the steps of mask training is warm-up."""


def trainings(pipeline: Pipeline) -> dict[str, Pretrain]:
    """{title: settings} of the trainings of the parent before it is pruned."""
    control: Any = pipeline.pruned
    return {"its masks": mask_training(pipeline.pretrain, tokens=control.tokens)} if control.tokens else {}


def mask_training(params: Pretrain, *, tokens: int) -> Pretrain:
    """The settings of the training of masks, by those of the sparse model's.

    The parent is trained with its masks, on cross-entropy alone, at the pruned model's rates. The schedule is Sheared
    LLaMA's: cosine after a warm-up of a tenth, no weight decay. Another seed gives other batches than the sparse
    model's.
    """
    dense = training.dense(params)
    return dense.model_copy(
        update={
            "tokens": tokens,
            "warmup_tokens": tokens // _WARMUP,
            "schedule": "cosine",
            "final_lr_share": 0.1,
            "weight_decay": 0.0,
            "learning_rates": {**dense.learning_rates, "masks": MASK_RATE},
            "distill": None,
            **FIXED,
            "seed": (params.seed + 1) % (1 << 32),
        }
    )
