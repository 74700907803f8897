"""Scores of tasks in words and as rows of the tables, from evaluation.json alone; imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.evaluate.downstream import paired

Rows = list[tuple[str, list[str]]]


def rows(evaluation: Mapping[str, Any], models: Sequence[str]) -> Rows:
    """The rows of the one table: scores, means of suites, gaps; a text per model."""
    table: Rows = []
    judged = [evaluation[key]["tasks"] for key in models]
    for task, first in judged[0].items():
        basis = f"n = {first['n']}, {first['num_fewshot']}-shot{_guess(first)}"
        table += [(f"{task} {metric} ({basis})", cells) for metric, cells in scores([of[task] for of in judged])]
    return table + means(evaluation, models) + gaps(evaluation, models)


def groups(judged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A group of rows for every task, as the pages' tables take them.

    Args:
        judged: {task: scores} of each model.
    """
    found = []
    for task, first in judged[0].items():
        basis = f"n = {first['n']}, {first['num_fewshot']}-shot, {first['harness']}, {first['dtype']}{_guess(first)}"
        found.append({"title": task, "basis": basis, "rows": scores([of[task] for of in judged])})
    return found


def scores(entries: Sequence[Mapping[str, Any]]) -> Rows:
    """A row for every metric of a task that has a standard error; `entries` are its scores of each model."""
    return [
        (metric, [f"{_number(entry[metric])} ± {_number(entry[f'{metric}_stderr'])}" for entry in entries])
        for metric in entries[0]
        if f"{metric}_stderr" in entries[0]
    ]


def _guess(entry: Mapping[str, Any]) -> str:
    return f", chance {entry['chance']:.3f}" if "chance" in entry else ""


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def means(evaluation: Mapping[str, Any], models: Sequence[str]) -> Rows:
    """A row for every suite of which a task was judged."""
    table: Rows = []
    for suite, entry in evaluation.get("suites", {}).items():
        if entry["mean"]:
            label = f"{suite}: mean of {len(entry['judged'])} of {entry['tasks']} tasks"
            table.append((label, [f"{entry['mean'][key]:.3f}" for key in models]))
    return table


def gaps(evaluation: Mapping[str, Any], models: Sequence[str]) -> Rows:
    """A row for every pair of tasks: accuracy in distribution less that out of it, with its interval."""
    table: Rows = []
    for pair in evaluation.get("robustness", []):
        cells = []
        for key in models:
            found = pair["models"][key]
            guessed = " (at chance)" if found["at_chance"] else ""
            cells.append(f"{_signed(found['gap'])} {_between(found)}{guessed}")
        table.append((f"gap: {pair['of']} − {pair['task']} ({pair['kind']})", cells))
    return table


def differences(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, dict[str, float]]]]:
    """(task, metric, {pair: {difference, low, high}}) of every metric that is a mean over items."""
    for task, by_metric in evaluation.get("paired", {}).get("tasks", {}).items():
        for metric, by_pair in by_metric.items():
            yield task, metric, by_pair


def interval(found: Mapping[str, float], field: str = "difference") -> str:
    """−0.040 (−0.120 to +0.040), and "undecided" where the interval has 0 in it."""
    text = f"{_signed(found[field])} {_between(found)}"
    return f"{text}, undecided" if found["low"] <= 0 <= found["high"] else text


def _between(found: Mapping[str, float]) -> str:
    return f"({_signed(found['low'])} to {_signed(found['high'])})"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def notes(evaluation: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Chance, the paired differences, and what is missing; "" where no task was asked for.

    Args:
        titles: {model: its title}.
    """
    parts = (chance(evaluation, titles), pairs(evaluation, titles), missing(evaluation))
    return " ".join(part for part in parts if part)


def chance(evaluation: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """For each multiple-choice task the accuracy of random guessing, and the scores within two standard errors of it.

    Guessing with accuracy c on n items has the standard error sqrt(c (1 - c) / n).
    """
    sentences = []
    for task, first in evaluation["dense"]["tasks"].items():
        if "chance" not in first:
            continue
        guess, error = first["chance"], math.sqrt(first["chance"] * (1 - first["chance"]) / first["n"])
        near = [
            f"{metric} {evaluation[key]['tasks'][task][metric]:.3f} ({title})"
            for metric in first
            if metric.startswith("acc") and f"{metric}_stderr" in first
            for key, title in titles.items()
            if paired.at_chance(evaluation[key]["tasks"][task][metric], chance=guess, n=first["n"])
        ]
        within = (
            f"within two standard errors of it: {', '.join(near)}" if near else "no score is within two of its errors"
        )
        sentences.append(f"{task}: random guessing scores {guess:.3f} ± {error:.3f}; {within}.")
    return " ".join(sentences)


def pairs(evaluation: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """The trained model less the others on the same items."""
    parts = []
    for task, metric, by_pair in differences(evaluation):
        for pair, found in by_pair.items():
            parts.append(f"{task} {metric} {interval(found)} compared with the {titles[pair.partition('_')[2]]}")
    if not parts:
        return ""
    level = evaluation["paired"]["level"]
    return f"After training, paired by item, with intervals of {level:.0%} (bootstrap): {'; '.join(parts)}."


def missing(evaluation: Mapping[str, Any]) -> str:
    """The tasks that could not be had, each with its reason."""
    left = evaluation.get("missing", {})
    return f"Not judged: {'; '.join(f'{task} ({why})' for task, why in left.items())}." if left else ""
