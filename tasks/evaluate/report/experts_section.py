"""The report's experts section: reconstruction error, balance and specialisation of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from tasks.evaluate import summary
from tasks.evaluate.report import charts
from tasks.evaluate.report.results import Results

HEAT_TOP = 3.0  # multiple of the even share with the strongest colour


def section(results: Results) -> dict[str, Any]:
    """The template's variables."""
    return {
        "note": summary.routing(results.evaluation),
        "heat_maps": heat_maps(results),
        "figures": [*busiest(results), *reconstruction(results), *specialisation(results)],
        "error": "" if results.partition["layer_error"] else "No error per layer: the method reads no text.",
    }


def heat_maps(results: Results) -> list[dict[str, Any]]:
    """Expert load per layer, before and after training; none without sparse layers."""
    return [
        heat_map(results.routing[key], results.evaluation["routing"][key], title=title.capitalize())
        for key, title in _sparse_models(results)
    ]


def heat_map(load: Mapping[str, Any], figures: Mapping[str, Any], *, title: str) -> dict[str, Any]:
    """The load of a model's experts as the variable `map` of heat_map.html.j2.

    Args:
        load: {domain: [sparse layers][experts] tokens}.
        figures: routing_balance.balance of it.
        title: of the chart.
    """
    import numpy as np

    load_LE = np.sum([np.asarray(each) for each in load.values()], axis=0)
    share_LE = np.sort(load_LE / np.maximum(load_LE.mean(1, keepdims=True), 1e-12), axis=1)[:, ::-1]
    return {
        "title": title,
        "chart": Markup(charts.heat_map(share_LE.tolist(), top=HEAT_TOP, label=f"expert load per layer, {title}")),
        "top": f"{HEAT_TOP:g}",
        "caption": f"{load_LE.shape[0]} sparse layers × {load_LE.shape[1]} experts. The busiest expert of a layer "
        f"gets {figures['peak']:.1f} times the even share on average; {figures['unused']:.1%} of the experts get no "
        "token.",
    }


def busiest(results: Results) -> list[dict[str, Any]]:
    """The load of each layer's top_k busiest experts."""
    curves, limit = {}, 0.0
    for key, title in _sparse_models(results):
        figures = results.evaluation["routing"][key]
        layers, limit = figures["layers"], figures["limit"]
        curves[title] = list(zip(layers["layer"], layers["busiest"], strict=True))
    if not curves:
        return []
    top_k, title = results.evaluation["routing"]["top_k"], "after training"
    chart = charts.lines(curves, x_label="layer", y_label="share of the load", zero=True, levels={title: limit})
    caption = (
        f"Share of the load on the {top_k} busiest experts of each layer. At 1 the router always chooses the same "
        f"{top_k}. Dashed: {limit:.2f}, half-way from an even load to 1; a layer above it counts as collapsed."
    )
    return [{"title": f"Load of the {top_k} busiest experts", "chart": Markup(chart), "caption": caption}]


def reconstruction(results: Results) -> list[dict[str, Any]]:
    """How much of each FFN's output its experts lose, as measured when they were made."""
    points = [(float(layer), error) for layer, error in results.partition["layer_error"].items()]
    if not points:
        return []
    chart = charts.lines({"error": sorted(points)}, x_label="layer", y_label="share of the output lost", zero=True)
    worst, error = max(points, key=lambda point: point[1])
    caption = (
        "Squared difference between the outputs of the dense FFN and of its experts, divided by the squared output of "
        "the dense FFN, on calibration text that went through the converted layers below. "
        f"Largest: {error:.1%} in layer {worst:.0f}."
    )
    return [
        {
            "title": f"Error of each layer after {summary.conversion(results.evaluation)}",
            "chart": Markup(chart),
            "caption": caption,
        }
    ]


def specialisation(results: Results) -> list[dict[str, Any]]:
    """Total variation distance between a domain's routing and that of all domains, per layer; none for one domain."""
    import numpy as np

    shown = []
    for key, title in _sparse_models(results):
        loads = {domain: np.asarray(load, dtype=float) for domain, load in results.routing[key].items()}
        if len(loads) < 2:
            return []
        shares = {domain: load / np.maximum(load.sum(1, keepdims=True), 1.0) for domain, load in loads.items()}
        centre = np.mean(list(shares.values()), axis=0)
        layers = results.evaluation["routing"][key]["layers"]["layer"]
        curves = {
            domain: list(zip(layers, (np.abs(share - centre).sum(1) / 2).tolist(), strict=True))
            for domain, share in shares.items()
        }
        chart = charts.lines(curves, x_label="layer", y_label="distance from the mean routing", zero=True)
        caption = (
            "Total variation distance: the share of a domain's routed tokens that would have to change experts to "
            "match the routing of the average domain."
        )
        shown.append({"title": f"Specialisation {title}", "chart": Markup(chart), "caption": caption})
    return shown


def _sparse_models(results: Results) -> list[tuple[str, str]]:
    """(key in evaluation.json, title) of the models whose routing is known."""
    pairs = list(zip(summary.models(results.evaluation), summary.titles(results.evaluation), strict=True))[1:3]
    return [(key, title) for key, title in pairs if results.evaluation["routing"][key]]
