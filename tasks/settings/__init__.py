"""Every knob of every pipeline: the pydantic models of `pipelines.yaml`.

    python -m tasks.settings [pipelines.yaml]      # validate, and print what is defined

Nothing runs before the whole file is valid. An error names the file, the path of the field, the value and what is
allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

import tasks.settings.consistency as consistency
from tasks.settings.control import Control
from tasks.settings.corpus import Corpus, Domain, Items
from tasks.settings.deployments import Deployment
from tasks.settings.evaluate import Evaluate, Task
from tasks.settings.fields import Frozen, Name
from tasks.settings.mixture import Mixture, Proxy, Swarm
from tasks.settings.model import Model, Shape
from tasks.settings.partition import Partition
from tasks.settings.pipeline import Pipeline
from tasks.settings.pretrain import Pretrain
from tasks.settings.text import FILE, SettingsError, read

__all__ = [  # callers say settings.Domain
    "FILE",
    "Control",
    "Corpus",
    "Domain",
    "Evaluate",
    "Items",
    "Mixture",
    "Model",
    "Partition",
    "Pipeline",
    "Pretrain",
    "Proxy",
    "Settings",
    "SettingsError",
    "Shape",
    "Swarm",
    "Task",
    "load",
    "read",
]

T = TypeVar("T")


class Settings(Frozen):
    """The whole of pipelines.yaml."""

    models: dict[Name, Model]
    corpora: dict[Name, Corpus]
    pipelines: dict[Name, Pipeline]
    deployments: list[Deployment] = Field(default_factory=list)

    @model_validator(mode="after")
    def _references(self) -> Self:
        for name, corpus in self.corpora.items():
            _known(f"corpora.{name}.model", corpus.model, self.models)
        for name, pipeline in self.pipelines.items():
            _known(f"pipelines.{name}.model", pipeline.model, self.models)
            _known(f"pipelines.{name}.corpus", pipeline.corpus, self.corpora)
        for i, deployment in enumerate(self.deployments):
            for call in deployment.calls:
                for kind, defined in (("pipeline", self.pipelines), ("corpus", self.corpora)):
                    if kind in call and "{{" not in str(call[kind]):
                        _known(f"deployments[{i}].parameters.{kind}", call[kind], defined)
        return self

    def pipeline(self, name: str) -> Pipeline:
        return _get("pipelines", self.pipelines, name)

    def corpus(self, name: str) -> Corpus:
        return _get("corpora", self.corpora, name)

    def model(self, name: str) -> Model:
        return _get("models", self.models, name)


def _get(section: str, entries: dict[str, T], name: str) -> T:
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
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError("\n".join(f"{path}: {_fault(fault)}" for fault in error.errors())) from None
    if faults := list(consistency.faults(settings.pipelines, corpora=settings.corpora, models=settings.models)):
        raise SettingsError("\n".join(f"{path}: {fault}" for fault in faults))
    return settings


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
