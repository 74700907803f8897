"""Charts: well-formed for any text and number, and drawn where the numbers say."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluate import charts

finite = st.floats(-1e9, 1e9)
label = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


def parse(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{markup}</div>")


@given(st.dictionaries(label, st.lists(st.tuples(finite, finite), max_size=5), max_size=4), label)
def test_a_line_chart_is_well_formed_whatever_the_labels_and_numbers(
    series: dict[str, list[tuple[float, float]]], axis: str
) -> None:
    markup = charts.lines(series, x_label=axis, y_label=axis)
    drawn = [name for name, points in series.items() if points]
    assert len(parse(markup).findall(".//path")) == len(drawn)


def test_points_that_are_not_finite_are_left_out() -> None:
    assert charts.lines({"a": [(0, float("nan"))]}, x_label="x", y_label="y") == ""
    markup = charts.lines({"a": [(0, 1.0), (1, float("inf")), (2, 3.0)]}, x_label="x", y_label="y")
    path = parse(markup).find(".//path")
    assert path is not None
    assert path.attrib["d"].count("L") == 1


@given(finite, finite, st.integers(2, 9))
def test_ticks_enclose_the_range_in_round_steps(a: float, b: float, count: int) -> None:
    low, high = min(a, b), max(a, b)
    found = charts.ticks(low, high, count=count)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 2 * count + 3


@given(st.integers(1, 6), st.integers(1, 30), st.data())
def test_every_cell_of_a_heat_map_is_painted_once(rows: int, columns: int, data: st.DataObject) -> None:
    cells = st.lists(st.floats(0, 9), min_size=columns, max_size=columns)
    grid = [data.draw(cells) for _ in range(rows)]
    painted: dict[tuple[int, int], int] = {}
    for path in parse(charts.heat_map(grid, top=3.0, label="load")).findall(".//path"):
        level = int(path.attrib["class"][1:])
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1", path.attrib["d"]):
            for i in range(int(width)):
                assert (int(x) + i, int(y)) not in painted
                painted[int(x) + i, int(y)] = level
    assert painted == {(x, y): min(8, int(v / 3.0 * 9)) for y, row in enumerate(grid) for x, v in enumerate(row)}


@given(st.dictionaries(label, st.fixed_dictionaries({"dense": st.floats(0, 9), "<moe>": st.floats(0, 9)}), min_size=1))
def test_dots_are_well_formed_and_one_for_each_value(rows: dict[str, dict[str, float]]) -> None:
    circles = parse(charts.dots(rows, label="bits & bytes")).findall(".//circle")
    assert len(circles) == 2 * len(rows)
