"""Differences between models on the same items, and gaps between tasks, with intervals of the bootstrap over items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from tasks.settings import Task

LEVEL = 0.95
DRAWS = 2000
_SEED = 0
_BATCH = 100  # draws at once: 8 MB of indices at 10,000 items
PAIRS = (("trained", "dense"), ("trained", "child"))
"""Models that are compared, the first minus the second."""


def interval(*samples: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Percentile interval of the mean of one sample, or of the first mean minus the second of two drawn apart.

    Efron and Tibshirani, An Introduction to the Bootstrap, sections 13.3 and 8.2; scipy draws.
    """
    import numpy as np
    from scipy import stats

    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if any(len(array) < 2 for array in arrays):  # nothing varies, and scipy refuses
        middle = _gap(*arrays)
        return float(middle), float(middle)
    found = stats.bootstrap(
        arrays,
        _gap,
        n_resamples=DRAWS,
        batch=_BATCH,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def _gap(*arrays: np.ndarray, axis: int = -1) -> Any:
    means = [array.mean(axis=axis) for array in arrays]
    return means[0] - means[1] if len(means) == 2 else means[0]


def at_chance(score: float, *, chance: float | None, n: int) -> bool:
    """Whether a score is within two standard errors of random guessing, sqrt(c (1 - c) / n)."""
    return chance is not None and abs(score - chance) <= 2 * math.sqrt(chance * (1 - chance) / n)


def main_metric(task: Task, scores: Mapping[str, Any]) -> str | None:
    """The metric by which a task is compared: the one that it names, else acc, else its first with an error."""
    if task.metric:
        return task.metric if task.metric in scores else None
    with_error = [key for key in scores if f"{key}_stderr" in scores]
    return "acc" if "acc" in with_error else with_error[0] if with_error else None


def differences(items: Mapping[str, Any], pairs: Sequence[tuple[str, str]] = PAIRS) -> dict[str, Any]:
    """Of every task and metric, each pair of models on the same items.

    Args:
        items: {task: {items: digests, metrics: {metric: {model: values}}}}, the content of items.json.
        pairs: of models, the first minus the second.

    Returns:
        {task: {metric: {trained_dense, trained_child or what the pairs are: {difference, low, high}}}}.
    """
    import numpy as np

    found: dict[str, Any] = {}
    for task, entry in items.items():
        for metric, by_model in entry["metrics"].items():
            for first, second in pairs:
                if first in by_model and second in by_model:
                    delta = np.subtract(by_model[first], by_model[second])
                    low, high = interval(delta)
                    result = {"difference": float(delta.mean()), "low": low, "high": high}
                    found.setdefault(task, {}).setdefault(metric, {})[f"{first}_{second}"] = result
    return found


def robustness(tasks: Sequence[Task], items: Mapping[str, Any], scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pairs of tasks, as MoE-RBench compares them (arXiv 2406.11353): accuracy in distribution and out of it.

    Args:
        tasks: those of the pipeline.
        items: the content of items.json.
        scores: {model: {task: scores}}.

    Returns:
        For each pair that was judged: task, of, kind (adversarial or ood), metric; models: {model: {inside, outside,
        gap: inside - outside, low, high, at_chance: those of the two that are}}; differences: {trained_dense,
        trained_child: {gap: the first model's gap minus the second's, low, high}}.
    """
    import numpy as np

    named = {task.name: task for task in tasks}
    rows = []
    for task in tasks:
        other = task.adversarial_of or task.ood_of
        if other is None or task.name not in items or other not in items:
            continue
        kind = "adversarial" if task.adversarial_of else "ood"
        first = next(iter(scores.values()))
        inner, outer = main_metric(named[other], first[other]), main_metric(task, first[task.name])
        inside, outside = items[other]["metrics"].get(inner), items[task.name]["metrics"].get(outer)
        if inside is None or outside is None:
            continue
        row: dict[str, Any] = {"task": task.name, "of": other, "kind": kind, "metric": outer, "models": {}}
        for model in inside:
            means = {"inside": float(np.mean(inside[model])), "outside": float(np.mean(outside[model]))}
            low, high = interval(inside[model], outside[model])
            guessed = [
                where
                for where, name in (("inside", other), ("outside", task.name))
                if at_chance(means[where], chance=first[name].get("chance"), n=first[name]["n"])
            ]
            gap = means["inside"] - means["outside"]
            row["models"][model] = means | {"gap": gap, "low": low, "high": high, "at_chance": guessed}
        row["differences"] = {
            f"{a}_{b}": _gap_difference(inside, outside, a, b) for a, b in PAIRS if a in inside and b in inside
        }
        rows.append(row)
    return rows


def _gap_difference(inside: Any, outside: Any, first: str, second: str) -> dict[str, float]:
    import numpy as np

    deltas = [np.subtract(side[first], side[second]) for side in (inside, outside)]
    low, high = interval(*deltas)
    return {"gap": float(_gap(*deltas)), "low": low, "high": high}


def suites(
    wanted: Mapping[str, Sequence[Task]], judged: Mapping[str, Task], scores: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Of each suite: tasks, how many of them were judged, and the mean of their main metrics for each model.

    Args:
        wanted: {suite: its tasks}.
        judged: {name: the task as the pipeline has it}.
        scores: {model: {task: scores}}.
    """
    first = next(iter(scores.values()))
    found = {}
    for suite, members in wanted.items():
        metrics = {
            task.name: metric
            for task in members
            if task.name in first and (metric := main_metric(judged[task.name], first[task.name]))
        }
        means = {
            model: math.fsum(of[name][metric] for name, metric in metrics.items()) / len(metrics)
            for model, of in scores.items()
            if metrics
        }
        found[suite] = {"tasks": len(members), "judged": metrics, "mean": means}
    return found
