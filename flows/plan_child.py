"""What the stage `control` costs: the dense child of a pipeline, from the settings alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks import plugin
from tasks.control import training
from tasks.moe import counts
from tasks.pretrain.log import meters
from tasks.settings import Corpus, Pipeline, Pretrain, SettingsError
from tasks.tools import estimate
from tasks.tools.estimate import Memory

SHAPE = ("num_hidden_layers", "num_key_value_heads", "hidden_size", "intermediate_size", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class ChildPlan:
    """Figures of a dense child."""

    parameters: int
    ffn_width: int
    flops: int
    """Of its cut, training and evaluation."""
    memory: Memory
    """Of rank 0 at its training, with the ZeRO stage of the settings."""
    scratch: dict[str, float]
    """Bytes in .scratch while it is trained, by what takes them."""
    shape: dict[str, int]
    """Its sizes that are not the parent's."""
    beside: dict[str, ParentPlan]
    """Trainings of the parent, by title: before the cut, and on the same batches if it is asked for."""


@dataclass(frozen=True, kw_only=True)
class ParentPlan:
    """Figures of a training of the parent."""

    steps: int
    flops: int
    memory: Memory
    scratch: dict[str, float]


def plan(
    dense: dict[str, Any], pipeline: Pipeline, *, corpus: Corpus, bfloat16: bool, cuda: bool = False
) -> ChildPlan | None:
    """Compute the figures; None without a child.

    Args:
        dense: the parent's config.json.
        corpus: what it is trained and judged on.
        bfloat16: the training dtype; float32 if not.
        cuda: train on GPUs.

    Raises:
        SettingsError: the settings ask for a child that cannot be.
    """
    control = pipeline.pruned
    if control is None:
        return None
    partition, judge = pipeline.partition, pipeline.evaluate
    try:
        config = control.config(dense, partition)
    except ValueError as error:
        raise SettingsError(f"control: {error}") from None
    train = training.dense(pipeline.pretrain)

    beside = {
        title: each for module in plugin.modules("cost").values() for title, each in module.trainings(pipeline).items()
    }
    if control.parent:
        beside["parent trained alike"] = train

    def forward(of: dict[str, Any], *, windows: int, seq_len: int) -> int:
        flops: int = counts.flops_per_token(of, seq_len=seq_len)["forward"]
        return windows * seq_len * flops

    def parent(params: Pretrain) -> ParentPlan:
        validated = estimate.evaluated_windows(params, domains=len(corpus.trained))
        step = params.step_tokens * meters.flops(dense, seq_len=params.seq_len, what="all")
        return ParentPlan(
            steps=params.steps,
            flops=params.steps * step + forward(dense, windows=validated, seq_len=params.seq_len),
            memory=estimate.memory(dense, params, bfloat16=bfloat16, cuda=cuda, parent=dense),
            scratch=estimate.disk(dense, params, bfloat16=bfloat16),
        )

    calibration, layers = partition.calibration_windows, dense["num_hidden_layers"]
    matrix = 2 * dense["hidden_size"] * dense["intermediate_size"]
    cut = 0
    if control.method == "static":
        cut = 7 * matrix * calibration * partition.fit_passes * train.seq_len * layers  # 3 forward, 4 backward
        cut += forward(dense, windows=calibration, seq_len=train.seq_len)
    flops = (
        cut
        + train.steps * train.step_tokens * meters.flops(config, seq_len=train.seq_len, what="all")
        + forward(dense, windows=train.steps * train.batch if train.distill else 0, seq_len=train.seq_len)
        + forward(
            config, windows=estimate.evaluated_windows(train, domains=len(corpus.trained)), seq_len=train.seq_len
        )
        + forward(config, windows=judge.windows_of(corpus), seq_len=judge.seq_len)
    )
    return ChildPlan(
        parameters=counts.parameters(config)["total"],
        ffn_width=config["intermediate_size"],
        flops=flops,
        memory=estimate.memory(config, train, bfloat16=bfloat16, cuda=cuda, parent=dense),
        scratch=estimate.disk(config, train, bfloat16=bfloat16),
        shape={field: config[field] for field in SHAPE if config.get(field) != dense.get(field)},
        beside={title: parent(params) for title, params in beside.items()},
    )
