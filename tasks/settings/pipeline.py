"""The section `pipelines`: which model and corpus, and the knobs of each stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from tasks.settings.control import Control
from tasks.settings.evaluate import Evaluate
from tasks.settings.fields import Above, Frozen, Name, NotNegative, Positive
from tasks.settings.partition import Partition
from tasks.settings.pretrain import Pretrain

FEWEST_STEPS = 20
"""Of masks, whose targets grow over a fifth of the steps."""
SMALLEST = 1e-6
"""Weights that sum to less are a slip of the exponent, and lose digits when they are normalised."""


class Mixture(Frozen):
    """Domain weights (tasks/mixture)."""

    method: Literal[
        "uniform",
        "proportional",
        "temperature",
        "unimax",
        "llama",
        "sheared_llama",
        "llama_moe",
        "explicit",
        "reference_loss",
    ]
    weights: dict[Name, NotNegative] | None = None
    """Of every domain; normalised. Needed by `explicit`; the start of `reference_loss` (uniform if absent)."""
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """`temperature` alone, which needs it: a domain's share is proportional to its tokens to this power."""
    max_epochs: Above = 4.0
    """No domain is given so large a share that training reads it more often than this (arXiv 2305.16264: up to four
    epochs are nearly as good as new text). It binds the weights at the start, not those that `dynamic` moves."""
    windows: Positive = 8
    """Validation windows per domain on which `reference_loss` measures the dense model."""

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.method == "explicit" and not self.weights:
            raise ValueError("method `explicit` needs `weights`: {domain: weight}")
        if self.method == "temperature" and self.alpha is None:
            raise ValueError("method `temperature` needs `alpha`: 0 is uniform, 1 proportional, 0.5 between")
        if self.method != "temperature" and self.alpha is not None:
            raise ValueError(f"method `{self.method}` takes no `alpha`; it is the exponent of `temperature`")
        if self.method not in {"explicit", "reference_loss"} and self.weights:
            raise ValueError(f"method `{self.method}` takes no `weights`")
        if self.weights is not None and sum(self.weights.values()) < SMALLEST:
            raise ValueError(f"`weights` must have a positive sum, of {SMALLEST} at least")
        return self


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
