"""The report's section on experts and routers in depth, from the content that figures.py returns.

All that it shows is in that file: an analysis that is added to tasks/plugins/analysis appears here by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from markupsafe import Markup

from tasks.evaluate.report import charts, page

TEMPLATE = "analysis.html.j2"
_WIDTH, _NAMES = 480, 140
_MOST_LETTERS = 20  # of a name, which fit the column
_CELL = 30  # at most
_BELOW = 24
_MOST_MARKS = 12


def section(content: Mapping[str, Any], titles: Mapping[str, str]) -> Markup:
    """The section as HTML; nothing of a run without analyses.

    Args:
        content: what `figures.measure` returns.
        titles: {key of a model: its title}.
    """
    if not content:
        return Markup("")
    template = page.environment("tasks.plugins.analysis").get_template(TEMPLATE)
    return Markup(template.render(analysis=variables(content, titles), **page.PARTS))


def variables(analysis: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    """The template's variables."""
    shown = [titles.get(key, key) for key in analysis["models"]]
    return {
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


def matrix(grid: Sequence[Sequence[float]], *, rows: Sequence[str], top: float, label: str) -> str:
    """Cells coloured in nine levels from 0 to `top` and above, rows from the top, columns numbered from 0.

    Args:
        grid: [rows][columns] of numbers >= 0; at least one.
        rows: their names; none, and they are numbered like the columns.
        top: value of the strongest colour.
        label: what a screen reader says.
    """
    columns, left = len(grid[0]), _NAMES if rows else 40
    size = min(_CELL, (_WIDTH - left - 4) / columns)
    height = len(grid) * size + _BELOW
    step = -(-columns // _MOST_MARKS)
    parts = []
    for y, values in enumerate(grid):
        name = rows[y] if rows else str(y)
        if rows or y % step == 0:
            middle = (y + 0.5) * size + 4
            shown = name if len(name) <= _MOST_LETTERS else name[: _MOST_LETTERS - 1] + "…"
            parts.append(f'<text class="end" x="{left - 8}" y="{middle:.1f}">{escape(shown)}</text>')
        for x, value in enumerate(values):
            level = min(charts.LEVELS - 1, int(value / top * charts.LEVELS))
            title = f"<title>{escape(name)}, {x}: {value:.2f}</title>"
            parts.append(
                f'<rect class="h{level}" x="{left + x * size:.1f}" y="{y * size:.1f}" width="{size:.1f}" '
                f'height="{size:.1f}">{title}</rect>'
            )
    for x in range(0, columns, step):
        middle = left + (x + 0.5) * size
        parts.append(f'<text class="mid" x="{middle:.1f}" y="{height - 7:.1f}">{x}</text>')
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
