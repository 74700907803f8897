"""The section on downstream tasks: scores, means of suites, differences on the same items, and gaps between tasks."""

from __future__ import annotations

from typing import Any

from tasks.evaluate import summary
from tasks.evaluate.downstream import paired, task_table
from tasks.evaluate.report.results import Results
from tasks.evaluate.report.section import Section, Table


def section(results: Results) -> Section | None:
    """The tables of scores and of differences, and what is missing; None if no task was asked for."""
    evaluation = results.evaluation
    models = summary.models(evaluation)
    titles = dict(zip(models, summary.titles(evaluation), strict=True))
    level = f"{evaluation['paired']['level']:.0%}"
    groups = task_table.groups([evaluation[key]["tasks"] for key in models])
    if rows := task_table.means(evaluation, models):
        groups.append({"title": "suites", "basis": "each task by its main metric", "rows": rows})
    if rows := task_table.gaps(evaluation, models):
        basis = f"accuracy in distribution less that out of it, {level} interval of the bootstrap over items"
        groups.append({"title": "robustness", "basis": basis, "rows": rows})
    tables = [Table(columns=list(titles.values()), groups=groups)] if groups else []
    if rows := differences(evaluation):
        basis = f"on the same items, {level} interval of the bootstrap; undecided: 0 is in it"
        against = [f"less the {titles[second]}" for _, second in paired.PAIRS if second in titles]
        group = {"title": "after training", "basis": basis, "rows": rows}
        tables.append(Table(columns=against, groups=[group]))
    notes = [text for text in (task_table.chance(evaluation, titles), task_table.missing(evaluation)) if text]
    if groups:
        notes.append("lm-eval computed the scores and their standard errors.")
    return Section(title="Downstream tasks", notes=notes, tables=tables) if notes else None


def differences(evaluation: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """A row for every metric of every task, and for every gap: the trained model less each of the others."""
    columns = [f"{first}_{second}" for first, second in paired.PAIRS if second in evaluation]
    rows = [
        (f"{task} {metric}", [task_table.interval(by_pair[column]) for column in columns])
        for task, metric, by_pair in task_table.differences(evaluation)
    ]
    rows += [
        (f"gap {pair['of']} − {pair['task']}", [task_table.interval(pair["differences"][c], "gap") for c in columns])
        for pair in evaluation.get("robustness", [])
    ]
    return rows
