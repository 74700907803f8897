"""The report's section on experts and routers in depth, from the content of analysis.json.

All that it shows is in that file: an analysis that is added to tasks/evaluate/analysis appears here by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from tasks.evaluate.report import charts
from tasks.evaluate.report.matrix import matrix

TEMPLATE = "analysis.html.j2"


def section(analysis: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    """The template's variables; of a run without analyses the name of the template alone, which then shows nothing.

    Args:
        analysis: what tasks.evaluate.analysis.run.analyse returns, or {}.
        titles: {key of a model: its title}.
    """
    if not analysis:
        return {"template": TEMPLATE, "groups": []}
    shown = [titles.get(key, key) for key in analysis["models"]]
    return {
        "template": TEMPLATE,
        "basis": basis(analysis),
        "columns": [*shown, "change"] if len(shown) == 2 else shown,
        "groups": [group(each, list(analysis["models"])) for each in analysis["analyses"].values()],
        "figures": [
            figure
            for each in analysis["analyses"].values()
            for figure in (*curves(each, dict(zip(analysis["models"], shown, strict=True))), *maps(each, titles))
        ],
        "notes": [*notes(analysis, titles), *(f"{name}: {why}." for name, why in analysis["left_out"].items())],
    }


def basis(analysis: Mapping[str, Any]) -> str:
    """What the figures rest on."""
    sizes = next(iter(analysis["models"].values()))
    experts = f"{sizes['experts']} routed experts of {sizes['expert_size']} neurons in {len(sizes['layers'])} layers"
    said = f"{experts}, of which a token passes {sizes['top_k']}. Figures are means over the layers."
    if (text := analysis["text"]) is None:
        return said
    windows = ", ".join(f"{count} of {domain}" for domain, count in text["windows"].items())
    return f"{said} Text: {text['tokens']:,} tokens in windows of {text['seq_len']} ({windows})."


def group(analysis: Mapping[str, Any], keys: list[str]) -> dict[str, Any]:
    """One analysis in the table: a row a figure, a value for each model, and for two models the difference."""
    means = [analysis["models"].get(key, {"mean": {}})["mean"] for key in keys]
    rows = []
    for chart, series in next(mean for mean in means if mean).items():
        for label in series:
            values = [mean.get(chart, {}).get(label) for mean in means]
            cells = ["–" if value is None else f"{value:z.3f}" for value in values]
            if len(values) == 2:
                cells.append("–" if None in values else f"{values[1] - values[0]:+z.3f}")
            rows.append((f"{chart}: {label}", [cell.replace("-", "−") for cell in cells]))
    return {"title": analysis["title"], "basis": analysis["note"], "rows": rows}


def curves(analysis: Mapping[str, Any], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every chart of an analysis, by layer: a line for each series of each model."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for key, model in analysis["models"].items():
        for layer, figures in model["layers"].items():
            for chart, series in figures["figures"].items():
                for label, value in series.items():
                    name = f"{label}, {titles[key]}" if len(analysis["models"]) > 1 else label
                    line = lines.setdefault(chart, {}).setdefault(name, [])
                    if value is not None:
                        line.append((float(layer), value))
    drawn = {chart: charts.lines(series, x_label="layer", y_label=chart) for chart, series in lines.items()}
    return [
        {"title": analysis["title"], "chart": Markup(chart), "top": "", "caption": ""}
        for chart in drawn.values()
        if chart
    ]


def maps(analysis: Mapping[str, Any], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """What an analysis draws in colours, of the last model that has it."""
    key, model = list(analysis["models"].items())[-1]
    return [
        {
            "title": (title := f"{drawn['title']}, {titles.get(key, key)}"),
            "chart": Markup(matrix(drawn["grid"], rows=drawn["rows"], top=drawn["top"], label=title)),
            "top": f"{drawn['top']:g}",
            "caption": drawn["caption"],
        }
        for drawn in model["maps"]
    ]


def notes(analysis: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """Why figures are not defined where they are not."""
    return [
        f"{each['title']}, {titles.get(key, key)}: {len(layers)} of {len(model['layers'])} layers undefined: {why}."
        for each in analysis["analyses"].values()
        for key, model in each["models"].items()
        for why, layers in model["undefined"].items()
    ]
