"""The result as one HTML page that loads nothing, with the parts of a pipeline's report."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tasks.evaluate import details, summary
from tasks.evaluate.report import charts, experts_section, page
from tasks.tools.evaluate import table


def render(result: dict[str, Any]) -> str:
    """The whole page."""
    return page.environment("tasks.tools.evaluate").get_template("checkpoints.html.j2").render(context(result))


def context(result: dict[str, Any]) -> dict[str, Any]:
    """The template's variables. Charts are markup, everything else is text that the template escapes."""
    columns, models = table.titles(result), result["models"]
    bits = _bits(models, columns, [*result["text"]["domains"], "mean"])
    if "unseen" in result["text"]:
        there = _bits([model["unseen"] for model in models], columns, [*result["text"]["unseen"], "mean"])
        bits |= {"unseen mean" if row == "mean" else row: figures for row, figures in there.items()}
    maps = [
        experts_section.heat_map(model["load"], model["routing"]["balance"], title=title)
        for title, model in zip(columns, models, strict=True)
        if "routing" in model
    ]
    return {
        **page.PARTS,
        "title": columns[0],
        "models": columns,
        "folders": [
            (title, model["class"], model["path"], f"{model['seconds']:.1f} s")
            for title, model in zip(columns, models, strict=True)
        ],
        "tiles": tiles(result),
        "notes": table.notes(result),
        "chart": Markup(charts.dots(bits, label="bits per byte; fewer is better")),
        "text": table.text(result),
        "others": table.others(result),
        "differences": table.differences(result),
        "heat_maps": maps,
        "details": [
            section
            for title, model in zip(columns, models, strict=True)
            for section in details.sections(model.get("details", {}), {model["path"]: title})
        ],
        "versions": page.versions(result["machine"]),
    }


def _bits(models: list[dict[str, Any]], columns: list[str], rows: list[str]) -> dict[str, dict[str, float]]:
    return {
        row: {title: model["bits_per_byte"][row] for title, model in zip(columns, models, strict=True)} for row in rows
    }


def tiles(result: dict[str, Any]) -> list[dict[str, str]]:
    """The headline figures of the first checkpoint, beside those of the second."""
    columns, (first, *others) = table.titles(result), result["models"]

    def beside(value: Any) -> str:
        return ", ".join(f"{title} {value(model)}" for title, model in zip(columns[1:], others, strict=True))

    def bits(model: dict[str, Any]) -> str:
        return f"{model['bits_per_byte']['mean']:.3f}"

    def active(model: dict[str, Any]) -> str:
        sizes = model["parameters"]
        return summary.count(sizes.get("active", sizes["total"]))

    shown = [{"label": "Bits per byte", "value": bits(first), "note": beside(bits)}]
    if "unseen" in first:
        shown.append(
            {
                "label": "Bits per byte, unseen text",
                "value": bits(first["unseen"]),
                "note": beside(lambda model: bits(model["unseen"])),
            }
        )
    shown.append({"label": "Active parameters", "value": active(first), "note": beside(active)})
    return shown
