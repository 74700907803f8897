"""The section `pipelines`: which model and corpus, and the knobs of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.settings.corpus import Corpus, SourceText
from tasks.settings.fields import LARGEST, Above, Frozen, Name, NotNegative, Positive, SeqLen, Sha256
from tasks.settings.partition import Partition
from tasks.settings.pretrain import Pretrain

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


class Task(Frozen):
    """An lm-eval task: over a local file, described by tasks/evaluate/harness/<name>.yaml, or a hub task by name."""

    name: Name
    source: SourceText | None = None
    sha256: Sha256 | None = None
    license: str | None = None
    num_fewshot: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    limit: Positive | None = None

    @model_validator(mode="after")
    def _source(self) -> Self:
        if self.sha256 is not None and self.source is None:
            raise ValueError("sha256 is that of the `source`, and there is none; leave it out")
        return self


MEASURES = Path(__file__).parent.parent / "evaluate" / "analysis" / "measures"
"""The analyses of experts and routers, a file each."""


class Evaluate(Frozen):
    """Evaluation and report (tasks/evaluate)."""

    seq_len: SeqLen
    windows: Positive = 8
    """Test windows of seq_len tokens per domain."""
    unseen_windows: Positive = 4
    """The same of each unseen domain."""
    batch: Positive = 4
    tasks: list[Task] = Field(default_factory=list)
    analyses: list[Name] = Field(default_factory=list)
    """Of experts and routers, before and after training (tasks/evaluate/analysis)."""
    analysis_windows: Positive = 1
    """Test windows per domain that the analyses read."""

    @model_validator(mode="after")
    def _tasks(self) -> Self:
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks: {', '.join(twice)} stands there twice, and one result would hide the other")
        if twice := sorted({name for name in self.analyses if self.analyses.count(name) > 1}):
            raise ValueError(f"analyses: {', '.join(twice)} stands there twice")
        known = sorted(path.stem for path in MEASURES.glob("[a-z]*.py"))
        if unknown := [name for name in self.analyses if name not in known]:
            raise ValueError(f"analyses: {', '.join(unknown)} is not known; known: {', '.join(known)}")
        return self

    def windows_of(self, corpus: Corpus) -> int:
        """Test windows on which each model is judged, of all domains together."""
        return self.windows * len(corpus.trained) + self.unseen_windows * len(corpus.unseen)


class Pipeline(Frozen):
    model: Name
    corpus: Name
    mixture: Mixture
    partition: Partition
    pretrain: Pretrain
    control: Literal["dense_child", "none"] = "none"
    """dense_child: also make, train and judge the dense model of the same active size (tasks/control)."""
    evaluate: Evaluate

    @model_validator(mode="after")
    def _reference(self) -> Self:
        dynamic = self.pretrain.dynamic
        if dynamic and dynamic.references == "parent" and self.mixture.method != "reference_loss":
            raise ValueError(
                "pretrain.dynamic.references: parent needs the parent's losses: set mixture.method: reference_loss"
            )
        return self
