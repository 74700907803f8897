"""The section `pipelines.NAME.evaluate`: windows, suites and tasks."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.settings.corpus import Corpus, SourceText
from tasks.settings.fields import LARGEST, Frozen, Name, Positive, SeqLen, Sha256, extended

Split = Annotated[str, Field(pattern=r"^\w+$", max_length=100, description="letters, digits and _")]


class File(Frozen):
    """The items of one split: JSON lines, parquet, csv, tsv or lines of text, by the ending of the file's name."""

    source: SourceText
    sha256: Sha256 | None = None


class Task(Frozen):
    """A task of lm-eval's collection by its name, or one that tasks/evaluate/downstream/harness/<name>.yaml describes.

    Its items come from the hub, or from local files, for tasks of lm-eval's collection too.
    """

    name: Name
    source: SourceText | None = None
    """The file of the split `test`."""
    sha256: Sha256 | None = None
    files: dict[Split, File] = Field(default_factory=dict)
    """The file of each split, by the names that the task's description has for them."""
    license: str | None = None
    num_fewshot: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    limit: Positive | None = None
    metric: str | None = None
    """The metric that suites average and pairs compare; acc, or the task's first, if absent."""
    adversarial_of: Name | None = None
    """The task with items of the distribution that these were made from to mislead (MoE-RBench, arXiv 2406.11353)."""
    ood_of: Name | None = None
    """The task with items of the distribution that these are out of."""

    @model_validator(mode="after")
    def _items(self) -> Self:
        if self.sha256 is not None and self.source is None:
            raise ValueError("sha256 is that of the `source`, and there is none; leave it out")
        if self.source is not None and self.files:
            raise ValueError("`source` is short for files: {test: {source: …}}; give one of the two")
        if self.adversarial_of and self.ood_of:
            raise ValueError("give one of `adversarial_of` and `ood_of`: a gap is between two tasks")
        return self

    @property
    def local(self) -> dict[str, File]:
        """The file of each split; {} where the items come from the hub."""
        return self.files if self.source is None else {"test": File(source=self.source, sha256=self.sha256)}


@extended("evaluate")
class Evaluate(Frozen):
    """Evaluation and report (tasks/evaluate)."""

    seq_len: SeqLen
    windows: Positive = 8
    """Test windows of seq_len tokens per domain."""
    unseen_windows: Positive = 4
    """The same of each unseen domain."""
    batch: Positive | Literal["auto"] = 4
    """Windows of a forward pass. auto: as many as fit into a GPU's memory, and 4 on a processor."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the tasks' forward passes. auto: bfloat16 where the device multiplies in it. Losses are always in float32."""
    suites: list[Name] = Field(default_factory=list)
    """Names of tasks/settings/suites.py."""
    limit: Positive | None = None
    """Items of each task that has no limit of its own."""
    tasks: list[Task] = Field(default_factory=list)
    """Single tasks; one that a suite has too changes what it names here, such as `files`, and keeps the rest."""

    @model_validator(mode="after")
    def _tasks(self) -> Self:
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks: {', '.join(twice)} stands there twice, and one result would hide the other")
        return self

    def windows_of(self, corpus: Corpus) -> int:
        """Test windows on which each model is judged, of all domains together."""
        return self.windows * len(corpus.trained) + self.unseen_windows * len(corpus.unseen)
