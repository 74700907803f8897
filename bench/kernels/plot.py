"""Draws a report: the fraction of the roofline by shape and side, one panel for each routing; TF/s where the device
has no roofline, a CPU."""

import importlib.util
from pathlib import Path
from typing import Any


def missing() -> str | None:
    """A line for the user, or None where a figure can be drawn."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return "--plot: matplotlib is not installed: pip install matplotlib, then the same command with --resume"


def draw(cells: dict[str, dict[str, Any]], path: Path, *, title: str) -> None:
    """Writes one figure, in the format of the suffix of ``path``.

    Args:
        cells: of a :class:`bench.kernels.report.Report`.
        path: ``.svg``, ``.png`` or what else matplotlib knows.
        title: what stands above; the card and the versions.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    routings = list(dict.fromkeys(cell["routing"] for cell in cells.values()))
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["sides"]))
    share = any("roofline" in side for cell in cells.values() for side in cell["sides"].values())
    columns = max(sum(cell["routing"] == routing for cell in cells.values()) for routing in routings)
    figure = Figure(figsize=(max(8, 1.5 * columns), 1 + 3.5 * len(routings)), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for routing, axes in zip(routings, figure.subplots(len(routings), squeeze=False)[:, 0], strict=True):
        shown = [cell for cell in cells.values() if cell["routing"] == routing]
        for place, name in enumerate(names):
            found = [cell["sides"].get(name, {}) for cell in shown]
            heights = [side.get("roofline", {}).get("full", 0) if share else side.get("tflops", 0) for side in found]
            left = [x + (place - (len(names) - 1) / 2) * 0.8 / len(names) for x in range(len(shown))]
            axes.bar(left, heights, 0.8 / len(names), label=name)
        labels = [f"{cell['name'] or 'E={experts} K={top_k}'.format(**cell)}\nT={cell['tokens']}" for cell in shown]
        axes.set_xticks(range(len(shown)), labels, fontsize="x-small")
        axes.set_ylabel(
            f"{'fraction of the roofline' if share else 'TF/s'}\nforward + backward, {routing}", fontsize="small"
        )
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    with rc_context({"svg.fonttype": "none"}):  # text that can be searched, not outlines
        figure.savefig(path)
