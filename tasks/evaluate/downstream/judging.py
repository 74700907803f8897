"""Judges models by tasks, one after the other: what is done is kept, and what cannot be had is named and left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks import scratch
from tasks.evaluate.downstream import accuracy, collection, paired
from tasks.settings import suites

if TYPE_CHECKING:
    from tasks.settings import Evaluate, Task


@dataclass(frozen=True)
class Judge:
    """The tasks of an evaluation and their items."""

    tasks: Sequence[Task]
    missing: dict[str, str]
    """{task: why it cannot be had}; it grows when a task fails for want of something."""
    items: collection.Collection | None
    """None without tasks."""

    def scores(
        self, load: Callable[[], tuple[Any, Any]], *, keep: Path, batch: int | Literal["auto"], dtype: str
    ) -> dict[str, Any]:
        """Judge a model by every task.

        Args:
            load: gives the model and its tokenizer.
            keep: start of the names of the files in which results are kept, one a task.
            batch: rows of tokens per forward pass, or auto.
            dtype: of the forward passes.

        Returns:
            {task: what accuracy.score returns, and seconds}.
        """
        done = {}
        for task in self.tasks:
            if self.items is None or task.name in self.missing:
                continue

            def measure(task: Task = task, items: collection.Collection = self.items) -> dict[str, Any]:
                start = time.perf_counter()
                result = accuracy.score(*load(), task, collection=items, batch=batch, dtype=dtype)
                return result | {"seconds": round(time.perf_counter() - start, 1)}

            try:
                found = kept(keep.with_name(f"{keep.name}-{task.name}.json"), measure)
            except (collection.UnavailableError, ConnectionError, ImportError) as error:
                self.missing[task.name] = collection.reason(error)
                print(f"  {task.name}: left out: {self.missing[task.name]}", flush=True)
                continue
            done[task.name] = found
            figures = ", ".join(f"{m} {v:.4f}" for m, v in found["scores"].items() if isinstance(v, float))
            print(f"  {task.name}: {figures}, n = {found['scores']['n']} ({found['seconds']:.0f} s)", flush=True)
        return done


def gather(tasks: Sequence[Task], folder: Path, *, versions: collection.Versions, missing: dict[str, str]) -> Judge:
    """Bring the items of all tasks into memory.

    Args:
        tasks: suites.judged.
        folder: where files and descriptions go.
        versions: collection.versions, by which the files must be what they were.
        missing: the tasks whose files cannot be had, with the reason.

    Raises:
        sources.SourceError: a file changed since `versions` looked at it.
    """
    missing = dict(missing)
    wanted = [task for task in tasks if task.name not in missing]
    items = None
    if wanted:
        items = collection.Collection(collection.prepare(wanted, folder, versions=versions), tasks=wanted)
        for task in wanted:
            try:
                items.load(task)
            except collection.UnavailableError as error:
                missing[task.name] = str(error)
    for name, why in missing.items():
        print(f"{name} is left out: {why}", flush=True)
    return Judge(tasks=tasks, missing=missing, items=items)


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a sealed file holds; measured and written if there is none, or a damaged one."""
    try:
        return scratch.read_sealed(path)
    except (FileNotFoundError, ValueError) as error:
        if path.exists():
            print(f"{path} is damaged ({error}); evaluating again", flush=True)
        scratch.write_sealed(path, measure())
        return scratch.read_sealed(path)


def by_item(done: Mapping[str, Mapping[str, Any]], *, missing: Mapping[str, str]) -> dict[str, Any]:
    """The content of items.json, from which every interval can be computed again.

    Args:
        done: {model: {task: accuracy.score}}.
        missing: tasks that are left out.

    Returns:
        {task: {items: [digest of each], metrics: {metric: {model: [value of each item]}}}}; accuracies are 0 and 1.

    Raises:
        ValueError: the models were judged by different items.
    """
    first = next(iter(done.values()))
    found = {}
    for task, entry in first.items():
        if task in missing:
            continue
        items = entry["items"]["items"]
        if any(of[task]["items"]["items"] != items for of in done.values()):
            raise ValueError(f"the models were judged by different items of {task}; run the stage again")
        metrics = {
            metric: {
                model: [_short(value) for value in of[task]["items"]["values"][metric]] for model, of in done.items()
            }
            for metric in entry["items"]["values"]
        }
        found[task] = {"items": items, "metrics": metrics}
    return found


def _short(value: float) -> float:
    return int(value) if value.is_integer() else round(value, 6)


def add(
    summary: dict[str, Any],
    done: Mapping[str, Mapping[str, Any]],
    items: Mapping[str, Any],
    *,
    knobs: Evaluate,
    missing: Mapping[str, str],
) -> None:
    """Add to evaluation.json what tasks say.

    Args:
        summary: gets, in each model, tasks {task: scores}; paired, {level, draws, tasks: `paired.differences`};
            robustness and suites, see `paired`; missing {task: reason}.
        done: {model: {task: accuracy.score}}.
        items: the content of items.json.
        knobs: the settings of the evaluation.
        missing: tasks that are left out.
    """
    tasks = {task.name: task for task in suites.judged(knobs)}
    scores = {
        model: {task: entry["scores"] for task, entry in of.items() if task not in missing}
        for model, of in done.items()
    }
    for model, of in scores.items():
        summary[model]["tasks"] = of
    summary["paired"] = {"level": paired.LEVEL, "draws": paired.DRAWS, "tasks": paired.differences(items)}
    summary["robustness"] = paired.robustness(list(tasks.values()), items, scores)
    summary["suites"] = paired.suites({name: suites.SUITES[name] for name in knobs.suites}, tasks, scores)
    summary["missing"] = {task.name: missing[task.name] for task in tasks.values() if task.name in missing}
