"""The page's section on domain weights, from made-up evidence of an estimate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tasks.evaluate.report import mixture_charts, mixture_section, page
from tasks.evaluate.report import results as results_module
from tasks.evaluate.report.results import Results
from tasks.evaluate.report.section import Section


def estimated(finished: Path, **evidence: Any) -> Results:
    """The results of a pipeline whose mixture.json has this evidence beside what every method has."""
    path = finished / "runs/demo/mixture.json"
    content = json.loads(path.read_text())
    domains = list(content["weights"])
    weights = {domain: 0.1 * (i + 1) for i, domain in enumerate(domains)}
    content["weights"] = weights
    content["method"] = "regmix"
    content["evidence"] = {
        "tokens": dict.fromkeys(domains, 50_000),
        "uniform": dict.fromkeys(domains, 0.25),
        "proportional": dict.fromkeys(domains, 0.25),
        "epochs": {domain: 2.0 * weight for domain, weight in weights.items()},
        "max_epochs": 4.0,
        "capped": {},
        **evidence,
    }
    path.write_text(json.dumps(content))
    return results_module.read("demo")


def made(results: Results) -> Section:
    section = mixture_section.section(results)
    assert section is not None
    return section


def test_a_method_that_trains_nothing_has_no_section_and_one_that_a_cap_lowered_names_the_domain(
    finished: Path,
) -> None:
    assert mixture_section.section(results_module.read("demo")) is None
    assert mixture_section.section(estimated(finished)) is None
    section = made(estimated(finished, capped={"legal": 0.55}))
    assert section.notes == [
        "Weights by method `regmix`. No domain is read more than 4 times, which lowers legal (would have 0.550)."
    ]
    rows = dict(section.tables[0].groups[0]["rows"])
    assert [row[-1] for row in rows.values() if row[-1].endswith("(cap 4)")] == [rows["legal"][-1]]


def test_a_swarms_section_says_units_spread_rank_correlation_cost_and_draws_weights_and_fit(finished: Path) -> None:
    domains = ["code", "books", "legal", "encyclopedia"]
    units = [{"weights": dict.fromkeys(domains, 0.25), "losses": dict.fromkeys(domains, 3.0), "seed": 0}] * 8
    results = estimated(
        finished,
        units=units,
        spread=dict(zip(domains, (0.01, 0.02, 0.03, 0.04), strict=True)),
        spread_over="bootstrap",
        left_out=[{"unit": "unit 5", "why": "its loss is not finite"}],
        fit={"predicted": [3.1, 3.2], "measured": [3.15, 3.3], "spearman": 0.87, "units": 10},
        cost={"tokens": 12_288, "flops": 3 * 10**15, "share_of_training": 0.5, "flops_share": 0.25},
    )
    section = made(results)
    assert section.notes == [
        "Weights by method `regmix`, which minimises the mean loss of the domains, from 8 trainings of a proxy on "
        "different mixes; ± is the standard deviation over fits to resampled units, 0.040 at most.",
        "On 2 mixes that the fit had not seen, predicted and measured losses have the rank correlation 0.87 "
        "(Spearman).",
        "Left out: unit 5 (its loss is not finite).",
        "The estimate took 12,288 tokens of proxies and 3.0 P FLOPs: 50% of the tokens of the training that it "
        "serves and 25% of its FLOPs.",
    ]
    assert [figure.title for figure in section.figures] == ["Weights", "Predicted and measured loss"]
    rows = dict(section.tables[0].groups[0]["rows"])
    assert rows["code"] == ["0.100 ± 0.010", "0.250", "0.250", "50,000", "4,915", "0.20"]
    assert "Predicted and measured loss" in page.render(results)


def test_a_trajectory_is_a_line_for_each_domain(finished: Path) -> None:
    domains = ["code", "books", "legal", "encyclopedia"]
    trajectory = [{"step": step, "weights": dict.fromkeys(domains, 0.25)} for step in (0, 10, 20)]
    figure = made(estimated(finished, trajectory=trajectory)).figures[-1]
    assert figure.title == "Weights while the proxy trained"
    assert figure.chart.count('class="line') == 4


def test_the_spread_is_a_bar_around_the_first_methods_dot() -> None:
    markup = mixture_charts.shares(
        {"a": {"olmix": 0.5, "uniform": 0.2}, "b": {"olmix": 0.5, "uniform": 0.8}}, spread={"a": 0.1}, label="share"
    )
    root = ElementTree.fromstring(f"<div>{markup}</div>")
    (span,) = [line for line in root.iter("line") if line.get("class") == "span"]
    dots = {dot.get("cy"): float(dot.get("cx") or 0) for dot in root.iter("circle") if dot.get("class") == "m0 dot"}
    middle = (float(span.get("x1") or 0) + float(span.get("x2") or 0)) / 2
    assert abs(middle - dots[span.get("y1")]) < 0.11


def test_equal_losses_lie_on_the_line() -> None:
    markup = mixture_charts.agreement([2.0, 3.0], [2.0, 3.0], label="nats")
    root = ElementTree.fromstring(f"<div>{markup}</div>")
    height = {float(dot.get("cx") or 0): float(dot.get("cy") or 0) for dot in root.iter("circle")}
    (x0, y0), (x1, y1) = sorted(height.items())
    (path,) = [each for each in root.iter("path") if each.get("class") == "faint"]
    start, end = (tuple(map(float, point.split())) for point in (path.get("d") or "")[1:].split("L"))
    slope = (end[1] - start[1]) / (end[0] - start[0])
    assert abs((y1 - y0) / (x1 - x0) - slope) < 0.01
