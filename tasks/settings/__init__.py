"""Every knob of every pipeline: the pydantic models of `pipelines.yaml`.

    python -m tasks.settings [pipelines.yaml]      # validate, and print what is defined

Nothing runs before the whole file is valid. An error names the file, the path of the field, the value and what is
allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from tasks.settings.corpus import Corpus, SourceText
from tasks.settings.corpus import Domain as Domain  # callers say settings.Domain
from tasks.settings.corpus import Items as Items
from tasks.settings.fields import Frozen, Name, Positive, Sha256
from tasks.settings.partition import Partition
from tasks.settings.pretrain import Pretrain
from tasks.settings.text import FILE, SettingsError, read


class Shape(Frozen):
    """Family and sizes, for plans and checks before anything is downloaded; the names are those of config.json."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    vocab_size: Positive
    tie_word_embeddings: bool = False
    head_dim: Positive | None = None


class Model(Frozen):
    """A dense LLaMA-family checkpoint."""

    source: SourceText
    sha256: Sha256 | None = None
    license: str
    hub_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """ORG/NAME on the Hugging Face hub, where `source` holds a copy from elsewhere; for the model card alone."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    shape: Shape | None = None


class Mixture(Frozen):
    """Domain weights (tasks/mixture)."""

    method: Literal["uniform", "proportional", "explicit", "reference_loss"]
    weights: dict[Name, Annotated[float, Field(ge=0)]] | None = None
    """Needed by `explicit`; the start of `reference_loss` (uniform if absent). Normalised to sum 1."""
    windows: Positive = 8
    """Validation windows per domain on which `reference_loss` measures the dense model."""

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.method == "explicit" and not self.weights:
            raise ValueError("method `explicit` needs `weights`: {domain: weight}")
        if self.method in {"uniform", "proportional"} and self.weights:
            raise ValueError(f"method `{self.method}` takes no `weights`")
        if self.weights is not None and sum(self.weights.values()) <= 0:
            raise ValueError("`weights` must have a positive sum")
        return self


class Task(Frozen):
    """An lm-eval task: over a local file, described by tasks/evaluate/harness/<name>.yaml, or a hub task by name."""

    name: Name
    source: SourceText | None = None
    sha256: Sha256 | None = None
    license: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    limit: Positive | None = None


class Evaluate(Frozen):
    """Evaluation and report (tasks/evaluate)."""

    seq_len: Positive
    windows: Positive = 8
    """Test windows of seq_len tokens per domain."""
    batch: Positive = 4
    tasks: list[Task] = Field(default_factory=list)


class Pipeline(Frozen):
    model: Name
    corpus: Name
    mixture: Mixture
    partition: Partition
    pretrain: Pretrain
    evaluate: Evaluate

    @model_validator(mode="after")
    def _reference(self) -> Self:
        dynamic = self.pretrain.dynamic
        if dynamic and dynamic.references == "parent" and self.mixture.method != "reference_loss":
            raise ValueError(
                "pretrain.dynamic.references: parent needs the parent's losses: set mixture.method: reference_loss"
            )
        return self


class Settings(Frozen):
    """The whole of pipelines.yaml. `deployments` are Prefect's; Prefect checks what this file does not."""

    models: dict[Name, Model]
    corpora: dict[Name, Corpus]
    pipelines: dict[Name, Pipeline]
    deployments: list[dict[str, Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _references(self) -> Self:
        for name, corpus in self.corpora.items():
            _known(f"corpora.{name}.model", corpus.model, self.models)
        for name, pipeline in self.pipelines.items():
            _known(f"pipelines.{name}.model", pipeline.model, self.models)
            _known(f"pipelines.{name}.corpus", pipeline.corpus, self.corpora)
            domains = self.corpora[pipeline.corpus].domains
            for domain in pipeline.mixture.weights or {}:
                _known(f"pipelines.{name}.mixture.weights", domain, domains)
            if shape := self.models[pipeline.model].shape:
                try:
                    pipeline.partition.check_width(shape.intermediate_size)
                    pipeline.partition.sparse_layers(shape.num_hidden_layers)
                except ValueError as error:
                    raise ValueError(f"pipelines.{name}.partition: {error}") from None
        for i, deployment in enumerate(self.deployments):
            given = deployment.get("parameters") or {}
            kind, defined = ("corpus", self.corpora) if "corpus" in given else ("pipeline", self.pipelines)
            _known(f"deployments[{i}].parameters.{kind}", given.get(kind), defined)
        return self

    def pipeline(self, name: str) -> Pipeline:
        return self._get("pipelines", name)

    def corpus(self, name: str) -> Corpus:
        return self._get("corpora", name)

    def model(self, name: str) -> Model:
        return self._get("models", name)

    def _get(self, section: str, name: str) -> Any:
        entries = getattr(self, section)
        if name not in entries:
            close = "".join(f"; did you mean {known}?" for known in difflib.get_close_matches(name, entries, n=1))
            raise SettingsError(f"{FILE}: {section} has no {name!r}; it has {', '.join(entries) or 'none'}{close}")
        return entries[name]


def load(path: Path | str = FILE) -> Settings:
    """Read and validate pipelines.yaml. Raises SettingsError listing every fault."""
    return validate(read(Path(path)), path=path)


def validate(raw: Any, *, path: Path | str = FILE) -> Settings:
    """Validate the content of pipelines.yaml, or of a recipe. Raises SettingsError listing every fault."""
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError("\n".join(f"{path}: {_fault(fault)}" for fault in error.errors())) from None


def _fault(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = f"unknown key; allowed here: {', '.join(_allowed(fault['loc']))}"
    value = fault["input"]
    shown = "" if isinstance(value, dict | list) or fault["type"] == "missing" else f" = {value!r}"
    return f"{where}{shown}: {message}" if where else message


def _allowed(loc: tuple[int | str, ...]) -> list[str]:
    """Keys of the section that holds the field at `loc`; a union's member stands in it by its tag."""
    kind: Any = Settings
    for part in loc[:-1]:
        if part in getattr(kind, "model_fields", {}):
            kind = kind.model_fields[part].annotation
        models = list(_models(kind))  # dict[str, Pipeline], Shape | None and list[Length | Language] too
        kind = next((m for m in models if len(models) == 1 or part in _tags(m)), kind)
    return list(getattr(kind, "model_fields", {}))


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in get_args(kind):
        yield from _models(inner)


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["rule"].annotation) if "rule" in model.model_fields else ()


def _known(field: str, name: Any, defined: dict[str, Any]) -> None:
    if name not in defined:
        raise ValueError(f"{field} = {name!r} is not defined; defined: {', '.join(defined) or 'none'}")
