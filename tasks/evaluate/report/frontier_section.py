"""The page's frontier: quality against measured speed and against FLOPs, an elastic model at each of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from tasks.evaluate import summary
from tasks.evaluate.report import charts
from tasks.evaluate.report.results import Results
from tasks.evaluate.report.section import Figure, Section
from tasks.evaluate.speeds import speed_table

Point = tuple[str, float, float, int]
_PERPLEXITY = "perplexity on test text; further down"


def section(results: Results) -> Section:
    """A chart of perplexity against decode speed, where it was measured, and one against FLOPs per token."""
    evaluation = results.evaluation
    figures = []
    if (row := speed_table.headline(evaluation.get("speed", {}))) is not None:
        chart = charts.scatter(
            by_speed(evaluation, row),
            x_label=f"decode, tokens/s: {speed_table.title(row)}",
            y_label=f"{_PERPLEXITY} and right is better",
        )
        caption = (
            f"The model after {summary.conversion(evaluation)} has the shape of the trained one, and stands at its "
            "speed. Each speed is the median of its repeats."
        )
        figures.append(Figure(title="Quality and speed", chart=Markup(chart), caption=caption))
    points = by_flops(evaluation)
    size, prefix = summary.unit(max(flops for _, flops, _, _ in points))
    chart = charts.scatter(
        [(label, flops / size, perplexity, model) for label, flops, perplexity, model in points],
        x_label=f"forward FLOPs per token, {prefix}",
        y_label=f"{_PERPLEXITY} and left is better",
    )
    caption = f"FLOPs of one token in a text of {evaluation['test']['seq_len']}; counted, not measured."
    figures.append(Figure(title="Quality and FLOPs", chart=Markup(chart), caption=caption))
    return Section(title="The frontier", figures=figures)


def by_speed(evaluation: Mapping[str, Any], row: Mapping[str, Any]) -> list[Point]:
    """(label, decode speed in an engine, perplexity, number of the colour) of the models, and at other top_k."""
    points = []
    for key, title in _titles(evaluation):
        measured = row["models"].get("trained" if key == "split" else key, {})
        if "decode" in measured:
            points.append((title, measured["decode"]["median"], evaluation[key]["perplexity"]["mean"], _colour(key)))
        for top_k, at in _others(evaluation, key):
            if "decode" in (faster := row.get("elastic", {}).get(top_k, {}).get(key, {})):
                label = f"{title}, top_k {top_k}"
                points.append((label, faster["decode"]["median"], at["perplexity"]["mean"], _colour(key)))
    return points


def by_flops(evaluation: Mapping[str, Any]) -> list[Point]:
    """The same against the FLOPs of a token."""
    points = []
    for key, title in _titles(evaluation):
        model = evaluation[key]
        points.append((title, model["flops_per_token"], model["perplexity"]["mean"], _colour(key)))
        for top_k, at in _others(evaluation, key):
            points.append((f"{title}, top_k {top_k}", at["flops_per_token"], at["perplexity"]["mean"], _colour(key)))
    return points


def _titles(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = dict(evaluation)
    return list(zip(summary.models(known), summary.titles(known), strict=True))


def _others(evaluation: Mapping[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """(top_k, figures) of a trained elastic model, without the top_k that it loads with."""
    settings = evaluation[key].get("elastic", {}) if key == "trained" else {}
    return [(top_k, at) for top_k, at in settings.items() if top_k != str(evaluation["routing"]["top_k"])]


def _colour(key: str) -> int:
    return summary.MODELS.index(key)
