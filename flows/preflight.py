"""Refuses before a run what would fail after hours: shapes that an inference engine cannot load, and sources and tasks
that the hub lacks or cannot serve as data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks import plugin, sources
from tasks.settings import Pretrain, Settings, SettingsError, harness
from tasks.settings import model as models
from tasks.sources import hub

PLACEHOLDER = "YOUR-NAME"
"""Stands in recipes where an address of one's own belongs."""


def require(settings: Settings, pipeline: str) -> None:
    """Raise SettingsError listing what of a pipeline is refused."""
    if refused := list(refusals(settings, pipeline)):
        raise SettingsError("\n".join(refused))


def refusals(settings: Settings, pipeline: str) -> Iterator[str]:
    """What of a pipeline is refused for sure, a line each: shapes that one of its engines cannot load, placeholders,
    and hub datasets with a loading script.

    The hub is asked for file listings and nothing is downloaded; out of reach, it says nothing against anything.
    """
    entry = settings.pipeline(pipeline)
    if (parent := _parent(settings, entry.model)) is not None:
        from tasks.partition import shapes

        try:
            shapes.require(parent, entry.partition)
        except ValueError as error:
            yield f"pipelines.{pipeline}.partition: {error}"
    parts = settings.corpus(entry.corpus).parts()
    if unfilled := [name.partition(" ")[2] for name, part in parts.items() if PLACEHOLDER in part.source]:
        yield (
            f"corpora.{entry.corpus}: the source of {', '.join(unfilled)} has {PLACEHOLDER} in it; put an address of "
            "yours there"
        )
    try:
        for name, part in parts.items():
            if (source := sources.parse(part.source)).kind == "hub":
                try:
                    hub.require_data_files(source, ask=True)
                except sources.SourceError as error:
                    yield f"corpora.{entry.corpus}, {name}: {error}"
        for task in entry.evaluate.tasks:
            if not task.local and (dataset := dataset_of(task.name)) and (fault := _fault(dataset)):
                yield (
                    f"pipelines.{pipeline}.evaluate.tasks: lm-eval reads {task.name} from hub:{dataset}, which {fault}"
                    "; name another task, or give it `files`"
                )
    except hub.Unreachable:
        return


def warnings(settings: Settings, pipeline: str) -> list[str]:
    """What of a pipeline will hardly work, and what engines will run slowly, with better shapes.

    Nothing of its shapes where its model is not known yet.
    """
    from tasks.partition import shapes

    entry = settings.pipeline(pipeline)
    parent = _parent(settings, entry.model)
    return training(entry.pretrain) + ([] if parent is None else shapes.warnings(parent, entry.partition))


def training(pretrain: Pretrain) -> list[str]:
    """What plug-ins say of a training that will hardly work."""
    modules = plugin.modules("settings").values()
    return [line for module in modules if hasattr(module, "warnings") for line in module.warnings(pretrain)]


def _parent(settings: Settings, model: str) -> Any:
    """Config object of the dense model; None where nothing is known of it yet."""
    known = models.config(model, settings.model(model))
    if known is None:
        return None
    from transformers import AutoConfig

    from tasks.moe import families

    fields = known[0] | {"dtype": settings.model(model).dtype}
    try:
        families.check(fields)
    except ValueError:  # the stage `model` says so
        return None
    return AutoConfig.for_model(**fields)


def _fault(dataset: str) -> str | None:
    """Why a dataset of the hub cannot be read; None if it can. Raises hub.Unreachable."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        script = hub.script_of(dataset)
    except HfHubHTTPError as error:
        return f"the hub refuses ({type(error).__name__}: {' '.join(str(error).split())})"
    return f"has a loading script ({script}) that `datasets` never runs" if script else None


def dataset_of(task: str) -> str | None:
    """The dataset of the hub that a task's description names, if it names one."""
    path = harness.description(task)
    dataset = harness.fields(path).get("dataset_path") if path else None
    return None if dataset in harness.FORMATS else dataset
