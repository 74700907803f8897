"""The section `pipelines`: which model and corpus, and the knobs of each stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Tag, model_validator

from tasks.settings.control import Control
from tasks.settings.evaluate import Evaluate
from tasks.settings.fields import Frozen, Name
from tasks.settings.mixture import Mixture
from tasks.settings.partition import Partition
from tasks.settings.pretrain import Pretrain

FEWEST_STEPS = 20
"""Of masks, whose targets grow over a fifth of the steps."""


class Pipeline(Frozen):
    model: Name
    corpus: Name
    mixture: Mixture
    partition: Partition
    pretrain: Pretrain
    control: Annotated[
        Annotated[Literal["dense_child", "none"], Tag("name")] | Annotated[Control, Tag("mapping")],
        Discriminator(lambda value: "name" if isinstance(value, str) else "mapping"),
    ] = "none"
    """dense_child: also make, train and judge the dense model of the same active size (tasks/control). A mapping: the
    same, with settings of its own."""
    evaluate: Evaluate

    @property
    def child(self) -> Control | None:
        """The settings of the dense child; None without one."""
        if isinstance(self.control, Control):
            return self.control
        return None if self.control == "none" else Control()

    @model_validator(mode="after")
    def _mask_steps(self) -> Self:
        tokens = self.child.tokens if self.child else None
        if tokens is not None and tokens < FEWEST_STEPS * self.pretrain.step_tokens:
            raise ValueError(
                f"control.tokens = {tokens}: masks need {FEWEST_STEPS} steps of batch x seq_len = "
                f"{self.pretrain.step_tokens} tokens at least; raise it to {FEWEST_STEPS * self.pretrain.step_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _reference(self) -> Self:
        dynamic = self.pretrain.dynamic
        if dynamic and dynamic.references == "parent" and self.mixture.method != "reference_loss":
            raise ValueError(
                "pretrain.dynamic.references: parent needs the parent's losses: set mixture.method: reference_loss"
            )
        return self
