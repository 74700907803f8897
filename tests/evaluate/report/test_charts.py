"""Charts: well-formed for any text and number, and drawn where the numbers say."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluate.report import charts

finite = st.floats(-1e9, 1e9)
label = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"), max_size=20
)  # XML's


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
    ticks = charts.ticks(low, high, count=count)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 2 * count + 3


def test_a_level_lies_across_at_its_height_in_the_colour_of_its_series() -> None:
    curves = {"a": [(0.0, 4.0), (1.0, 3.0)], "b": [(0.0, 2.0), (1.0, 2.0)]}
    chart = parse(charts.lines(curves, x_label="x", y_label="y", levels={"b": 0.0, "c": 9.0}))
    (level,) = (path for path in chart.findall(".//path") if "level" in path.attrib["class"])
    assert level.attrib["class"] == "level s1"
    across = float(re.fullmatch(r"M46 ([\d.]+)H466", level.attrib["d"])[1])  # type: ignore[index]
    heights = {text.text: float(text.attrib["y"]) - 4 for text in chart.findall(".//text[@class='end']")}
    assert across == heights["0"], "the scale reaches down to it"


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


@given(
    st.lists(st.tuples(label, st.floats(0, 1e6), st.floats(1, 1e6), st.integers(0, 3)), min_size=1, max_size=4), label
)
def test_dots_on_axes_lie_as_far_right_and_up_as_their_numbers_say(
    points: list[tuple[str, float, float, int]], axis: str
) -> None:
    circles = parse(charts.scatter(points, x_label=axis, y_label=axis)).findall(".//circle")
    assert [circle.attrib["class"] for circle in circles] == [f"m{model} dot" for _, _, _, model in points]
    drawn = list(zip(points, circles, strict=True))
    for ((_, x, y, _), one), ((_, other_x, other_y, _), other) in itertools.permutations(drawn, 2):
        assert x < other_x or float(one.attrib["cx"]) >= float(other.attrib["cx"])
        assert y < other_y or float(one.attrib["cy"]) <= float(other.attrib["cy"])


tokens = st.integers(0, 10**13)


@given(st.dictionaries(label, st.fixed_dictionaries({"a<b": tokens, "&": tokens}), min_size=1, max_size=9))
def test_bars_lie_end_to_end_from_zero_and_are_as_long_as_the_numbers_say(rows: dict[str, dict[str, int]]) -> None:
    drawn = [number_attributes(rect) for rect in parse(charts.bars(rows, label="tokens & more")).findall(".//rect")]
    values = [value for row in rows.values() for value in row.values()]
    assert len(drawn) == len(values)
    longest = max(max(rect["width"] for rect in drawn), 1e-9)
    for rect, value in zip(drawn, values, strict=True):
        assert abs(rect["width"] / longest - value / max(*values, 1)) < 0.01 or rect["width"] < 0.02
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        assert first["x"] == charts.NAMES
        assert abs(second["x"] - first["x"] - first["width"]) < 0.02
        assert second["x"] + second["width"] <= charts.WIDTH - 59


def test_a_bar_says_its_sum() -> None:
    texts = [text.text for text in parse(charts.bars({"code": {"a": 2_817_345, "b": 91_233}}, label="t")).iter("text")]
    assert texts[-2:] == ["code", "2.91M"]


buckets = st.dictionaries(st.integers(0, 40), st.integers(0, 10**9), max_size=8)


@given(st.dictionaries(label, buckets, max_size=5))
def test_histograms_draw_each_bucket_between_its_powers_and_as_high_as_its_share(
    rows: dict[str, dict[int, int]],
) -> None:
    markup = charts.histograms(rows, label="tokens & more")
    full = {name: {k: n for k, n in row.items() if n} for name, row in rows.items()}
    shares = [(k, n / sum(row.values())) for row in full.values() for k, n in sorted(row.items())]
    if not shares:
        assert markup == ""
        return
    drawn = [number_attributes(rect) for rect in parse(markup).findall(".//rect")]
    assert len(drawn) == len(shares)
    low, high = min(k for k, _ in shares), max(k for k, _ in shares) + 1
    step = (charts.WIDTH - charts.NAMES - 24) / (high - low)
    for rect, (k, share) in zip(drawn, shares, strict=True):
        assert abs(rect["x"] - charts.NAMES - (k - low) * step) < 0.6
        assert abs(rect["width"] - step) < 1.1
        assert abs(rect["height"] - share / max(s for _, s in shares) * (charts.ROW - 6)) < 0.01
        assert abs((rect["y"] + rect["height"] - 2) / charts.ROW % 1 - 0.5) > 0.49  # stands on its row's line
    marks = [text for text in parse(markup).iter("text") if text.attrib["class"] == "mid"]
    assert 2 <= len(marks) <= 10
    gaps = [float(b.attrib["x"]) - float(a.attrib["x"]) for a, b in itertools.pairwise(marks)]
    assert min(gaps) > 30  # no two labels touch


def test_the_axis_of_a_histogram_is_written_in_powers_of_two() -> None:
    markup = charts.histograms({"code": {9: 1, 10: 3}}, label="tokens")
    assert [text.text for text in parse(markup).iter("text") if text.attrib["class"] == "mid"] == ["512", "1k", "2k"]
    assert "<title>code, 1,024 to 2,047: 3 (75.0%)</title>" in markup


def number_attributes(rect: ElementTree.Element) -> dict[str, float]:
    return {key: float(rect.attrib[key]) for key in ("x", "y", "width", "height")}
