"""The section on experts and routers, from a file as the analyses write it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluate.report import page
from tasks.evaluate.report import results as results_module
from tasks.plugins.analysis import section as analysis_section
from tasks.plugins.analysis.section import matrix

TITLES = {"split": "after the split", "trained": "after training"}


def content() -> dict[str, Any]:
    """analysis.json of two models with two layers."""

    def model(shift: float, *, defined: bool) -> dict[str, Any]:
        r2 = [0.25 + shift if defined else None, 0.75 + shift]
        layers = {str(i): {"figures": {"R²": {"gate": r2[i], "up": -0.5 - shift}}, "undefined": ""} for i in range(2)}
        grid = {
            "title": "Load",
            "grid": [[0.5, 9.0], [1.0, 0.0]],
            "top": 3.0,
            "caption": "By <kind>.",
            "rows": ["a", "<b>"],
        }
        return {
            "layers": layers,
            "mean": {"R²": {"gate": 0.5 + shift, "up": -0.5 - shift}},
            "undefined": {} if defined else {"all pairs of experts are equally alike": [0]},
            "maps": [grid],
        }

    sizes = {"experts": 8, "expert_size": 384, "layers": [0, 1], "top_k": 1}
    return {
        "models": {"split": sizes, "trained": sizes},
        "text": {"tokens": 2048, "seq_len": 512, "windows": {"books": 2, "code": 2}},
        "analyses": {
            "router": {
                "title": "Router rows",
                "note": "What it means.",
                "models": {"split": model(0.0, defined=False), "trained": model(0.125, defined=True)},
            },
            "stability": {"title": "Stability", "note": "Of it.", "models": {"trained": model(0.0, defined=True)}},
        },
        "left_out": {"load": "needs a text"},
    }


def test_the_table_has_every_mean_of_both_models_and_the_change() -> None:
    made = analysis_section.variables(content(), TITLES)
    assert made["columns"] == ["after the split", "after training", "change"]
    router, stability = made["groups"]
    assert router["rows"] == [
        ("R²: gate", ["0.500", "0.625", "+0.125"]),
        ("R²: up", ["−0.500", "−0.625", "−0.125"]),
    ]
    assert stability["rows"][0] == ("R²: gate", ["–", "0.500", "–"])
    assert "2,048 tokens in windows of 512 (2 of books, 2 of code)" in made["basis"]
    assert made["notes"] == [
        "Router rows, after the split: 1 of 2 layers undefined: all pairs of experts are equally alike.",
        "load: needs a text.",
    ]


def test_every_chart_has_a_line_for_each_series_of_each_model_and_leaves_gaps_where_nothing_is_defined() -> None:
    drawn = [figure for figure in analysis_section.variables(content(), TITLES)["figures"] if not figure["top"]]
    chart = ElementTree.fromstring(f"<div>{drawn[0]['chart']}</div>")
    lines = {path.findtext("title"): path.attrib["d"].count("L") + 1 for path in chart.iter("path")}
    assert lines == {
        "gate, after the split": 1, "up, after the split": 2, "gate, after training": 2, "up, after training": 2,
    }  # fmt: skip


def test_the_page_shows_the_section_where_there_are_analyses_and_nothing_where_there_are_none(finished: Path) -> None:
    assert "Experts and routers in depth" not in page.render(results_module.read("demo"))
    Path("runs/demo/details.json").write_text(json.dumps({"analysis": content()}))
    html = page.render(results_module.read("demo"))
    section = html.split("Experts and routers in depth")[1].split("<h2>")[0]
    assert '<td class="n"><b>+0.125</b> </td>' in section
    assert "By &lt;kind&gt;." in section
    assert "&lt;b&gt;" in section
    assert "<b>," not in section
    assert "Load, after training" in section
    assert section.count("<svg") == 4


def test_one_model_alone_has_no_column_of_changes_and_no_names_in_its_lines() -> None:
    alone = content()
    del alone["models"]["split"]
    del alone["analyses"]["router"]["models"]["split"]
    alone["text"] = None
    made = analysis_section.variables(alone, {})
    assert made["columns"] == ["trained"]
    assert "<title>gate</title>" in made["figures"][0]["chart"]
    assert "Text" not in made["basis"]


@given(st.integers(1, 5), st.integers(1, 40), st.booleans(), st.data())
def test_a_matrix_has_a_cell_for_each_number_in_the_colour_of_its_level(
    rows: int, columns: int, named: bool, data: st.DataObject
) -> None:
    cells = st.lists(st.floats(0, 9), min_size=columns, max_size=columns)
    grid = [data.draw(cells) for _ in range(rows)]
    names = [f"<{i}>" for i in range(rows)] if named else []
    drawn = ElementTree.fromstring(matrix(grid, rows=names, top=3.0, label="a & b"))
    levels = [int(rect.attrib["class"][1:]) for rect in drawn.findall("rect")]
    assert levels == [min(8, int(value / 3.0 * 9)) for row in grid for value in row]
    assert max(float(r.attrib["x"]) + float(r.attrib["width"]) for r in drawn.findall("rect")) <= 480
    assert [text.text for text in drawn.findall("text")][: len(names)] == names
    assert re.match(r"<svg class=\"chart\" viewBox=\"0 0 480 \d+\"", matrix(grid, rows=names, top=3.0, label=""))
