"""Where the items of tasks come from: local files that lm-eval is pointed at, or the hub, as its descriptions say."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import scratch, sources
from tasks.settings import harness

if TYPE_CHECKING:
    from tasks.settings import Task

HARNESS = Path(__file__).parent / "harness"
CACHE = scratch.ROOT / "sources"
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t", "quoting": 3}),  # quotes are text, as GLUE's files have it
    ".txt": ("text", {}),
}
"""Builders of `datasets` by the ending of a file's name; all others are JSON lines."""
Versions = dict[str, dict[str, dict[str, str]]]


class UnavailableError(Exception):
    """The items of a task cannot be had; the message is the reason."""


def versions(tasks: Iterable[Task]) -> tuple[Versions, dict[str, str]]:
    """Fetch the files of local tasks.

    Returns:
        {task: {split: {file: version}}}; {task: why its files cannot be had}.
    """
    found: Versions = {}
    missing: dict[str, str] = {}
    for task in tasks:
        try:
            splits = {
                split: sources.fetch(file.source, CACHE, sha256=file.sha256).versions()
                for split, file in task.local.items()
            }
        except sources.SourceError as error:
            missing[task.name] = reason(error)
        else:
            if splits:
                found[task.name] = splits
    return found, missing


def prepare(tasks: Iterable[Task], folder: Path, *, versions: Versions | None = None) -> Path:
    """Write `folder`/NAME.yaml for each task that lm-eval would not find, or find elsewhere.

    Args:
        tasks: those whose files can be had.
        folder: where their files and descriptions go.
        versions: the expected versions of the files, so that all models are scored on the same ones.

    Returns:
        the folder to give to `Collection`.

    Raises:
        sources.SourceError: a file cannot be had, its sha256 differs, or it changed.
        FileNotFoundError: a task has files but no description.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        if fault := harness.why_no_items(task.name, task.local):
            raise FileNotFoundError(f"pipelines.yaml: evaluate.tasks: {task.name!r}: {fault}")
        described = harness.description(task.name)
        if described is None or (not task.local and described.parent != HARNESS):
            continue
        content: dict[str, Any] = {"include": str(described.resolve())}
        if task.local:
            copied = {
                split: _copy(task, split, folder, versions=versions[task.name][split] if versions else None)
                for split in task.local
            }
            content |= _pointed(copied, described, cache=folder / "datasets")
        _write_yaml(folder / f"{task.name}.yaml", content)
    return folder


def _copy(task: Task, split: str, folder: Path, *, versions: dict[str, str] | None) -> list[Path]:
    file = task.local[split]
    fetched = sources.fetch(file.source, CACHE, sha256=file.sha256)
    made = []
    with fetched.unchanged(versions):
        for i, path in enumerate(fetched.paths):
            target = folder / f"{task.name}-{split}-{i}{''.join(Path(path).suffixes)}"
            with fetched.fs.open(path, "rb") as read, target.open("wb") as write:
                shutil.copyfileobj(read, write)
            made.append(target.resolve())
    return made


def _pointed(files: dict[str, list[Path]], described: Path, *, cache: Path) -> dict[str, Any]:
    """What a description is overridden with: the files, and no splits but theirs."""
    first = next(iter(files.values()))[0]
    builder, options = next((_FORMATS[end] for end in reversed(first.suffixes) if end in _FORMATS), ("json", {}))
    absent = {field: None for field, split in harness.splits(described).items() if split not in files}
    data = {split: [str(path) for path in paths] for split, paths in files.items()}
    where = {"data_files": data, "cache_dir": str(cache.resolve())}
    return absent | {"dataset_path": builder, "dataset_name": None, "dataset_kwargs": options | where}


class Collection:
    """lm-eval's tasks with their items, each read once for all models."""

    def __init__(self, prepared: Path, *, tasks: Sequence[Task]) -> None:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of descriptions of its own
        from lm_eval.tasks import TaskManager

        described = {path.stem for path in prepared.glob("*.yaml")}
        own = any(task.name not in described for task in tasks)
        self._manager = TaskManager(include_path=prepared, include_defaults=own)
        self._loaded: dict[str, Any] = {}

    def load(self, task: Task) -> Any:
        """lm-eval's task or group, with the shots that lm-eval's command would draw.

        Raises:
            ValueError: lm-eval knows no such task.
            UnavailableError: its items cannot be had: no hub, no data set, a package that is not installed.
        """
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        if task.name not in self._loaded:
            self._loaded[task.name] = self._make(task)
        made = self._loaded[task.name]
        for each in made["tasks"].values():
            if each.get_config("num_fewshot") != 0:  # a description that says 0 has its shots in the prompt
                each.set_config(key="num_fewshot", value=task.num_fewshot)
            each.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # the same shots for every model
        return made

    def _make(self, task: Task) -> Any:
        from huggingface_hub import constants
        from lm_eval.defaults import DEFAULT_RANDOM_SEED

        if task.name not in self._manager.all_tasks:
            raise ValueError(
                f"pipelines.yaml: evaluate.tasks: lm-eval {metadata.version('lm_eval')} knows no task {task.name!r}; "
                "correct the name, or give `files` and describe it in tasks/evaluate/downstream/harness/"
            )
        random.seed(DEFAULT_RANDOM_SEED)  # for descriptions that shuffle answers
        try:
            return self._manager.load([task.name])
        except Exception as error:  # whatever lm-eval, `datasets` and the hub's client raise for what is not there
            if isinstance(error, ConnectionError):
                constants.HF_HUB_OFFLINE = True  # each task would wait 20 s more; what is cached can still be had
            raise UnavailableError(reason(error)) from error


def reason(error: Exception) -> str:
    """One line that is the same whenever the same is missing."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__


def _write_yaml(path: Path, value: Any) -> None:
    from ruamel.yaml import YAML

    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(value, file)
