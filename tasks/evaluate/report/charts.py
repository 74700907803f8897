"""Inline SVG charts without a library: lines, dots on a scale or on axes, bars, histograms, a heat map.

Colours are the page's CSS classes. Every function returns markup that stands alone in a page; all text is escaped.
Series are classes `s0` to `s7`, models `m0` to `m4`, heat levels `h0` to `h8`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = 8
LEVELS = 9
WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 38
ROW = 34
NAMES = 112  # width of the column of row names


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    faint: str = "",
    zero: bool = False,
    levels: Mapping[str, float] | None = None,
) -> str:
    """A line chart.

    Args:
        series: {label: [(x, y)]}; points that are not finite are left out, a series without points too.
        x_label, y_label: axis titles.
        faint: label of a series drawn thin, behind the others.
        zero: let the y axis begin at 0.
        levels: {label: y} of a dashed line across in the colour of that series; labels without a series are left out.

    Returns:
        markup, "" if there is nothing to draw.
    """
    series = {
        label: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for label, points in series.items()
    }
    series = {label: points for label, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    levels = {label: y for label, y in (levels or {}).items() if label in series}
    ys = [y for points in series.values() for _, y in points] + list(levels.values())
    x_ticks = ticks(min(xs), max(xs), count=6)
    y_ticks = ticks(0.0 if zero else min(ys), max(ys), count=5)
    x_low, x_high = _widened(min(xs), max(xs))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(grid_line(py(tick), number(tick)))
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            parts.append(f'<text class="mid" x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 17}">{number(tick)}</text>')
    axis = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis}" y2="{axis}"/>')
    parts.append(f'<text class="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">{escape(x_label)}</text>')
    ordered = sorted(enumerate(series.items()), key=lambda item: item[1][0] != faint)
    for i, (label, points) in ordered:
        style = "faint" if label == faint else f"line s{i % COLOURS}"
        path = "M" + "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in points)
        parts.append(f'<path class="{style}" d="{path}"><title>{escape(label)}</title></path>')
        if label in levels:
            across = f"M{LEFT} {py(levels[label]):.1f}H{WIDTH - RIGHT}"
            parts.append(f'<path class="level s{i % COLOURS}" d="{across}"><title>{escape(label)}</title></path>')
        if label != faint:
            x, y = points[-1]
            parts.append(f'<circle class="s{i % COLOURS}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"/>')
    keys = [(label, "faint" if label == faint else f"s{i % COLOURS}") for i, label in enumerate(series)]
    chart = svg("".join(parts), width=WIDTH, height=HEIGHT, label=f"{y_label} by {x_label}")
    return f'<p class="unit">{escape(y_label)}</p>{chart}{legend(keys)}'


def scatter(points: Sequence[tuple[str, float, float, int]], *, x_label: str, y_label: str) -> str:
    """One dot per model, named in a legend.

    Args:
        points: (label, x, y, number of the model's colour).
        x_label, y_label: axis titles; the x axis begins at 0.
    """
    x_ticks = ticks(0.0, max(x for _, x, _, _ in points), count=6)
    y_ticks = ticks(min(y for _, _, y, _ in points), max(y for _, _, y, _ in points), count=5)
    parts = []

    def px(x: float) -> float:
        return LEFT + x / x_ticks[-1] * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    for tick in y_ticks:
        parts.append(grid_line(py(tick), number(tick)))
    axis = HEIGHT - BOTTOM
    for tick in x_ticks:
        parts.append(f'<text class="mid" x="{px(tick):.1f}" y="{axis + 17}">{number(tick)}</text>')
    parts.append(f'<text class="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">{escape(x_label)}</text>')
    for label, x, y, model in points:
        title = f"<title>{escape(label)}: {x:.1f}, {y:.2f}</title>"
        parts.append(f'<circle class="m{model} dot" cx="{px(x):.1f}" cy="{py(y):.1f}" r="6.5">{title}</circle>')
    chart = svg("".join(parts), width=WIDTH, height=HEIGHT, label=f"{y_label} by {x_label}")
    keys = [(label, f"m{model}") for label, _, _, model in points]
    return f'<p class="unit">{escape(y_label)}</p>{chart}{legend(keys)}'


def dots(rows: Mapping[str, Mapping[str, float]], *, label: str) -> str:
    """One row per name, one dot per series on a common scale, the span between them drawn as a bar.

    Args:
        rows: {row: {series: value}}.
        label: what is measured, with its unit.
    """
    values = [value for row in rows.values() for value in row.values()]
    scale = ticks(0.0, max(values), count=6)
    height = len(rows) * ROW + 30

    def px(value: float) -> float:
        return NAMES + value / scale[-1] * (WIDTH - NAMES - 24)

    parts = row_scale([(px(tick), number(tick)) for tick in scale], height=height)
    for i, (name, row) in enumerate(rows.items()):
        y = i * ROW + ROW / 2 + 4
        low, high = min(row.values()), max(row.values())
        parts.append(row_name(name, y=y + 4))
        parts.append(f'<line class="span" x1="{px(low):.1f}" x2="{px(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for j, (series, value) in enumerate(row.items()):
            title = f"<title>{escape(name)}, {escape(series)}: {value:.3f}</title>"
            parts.append(f'<circle class="m{j} dot" cx="{px(value):.1f}" cy="{y:.1f}" r="6.5">{title}</circle>')
    keys = [(series, f"m{j}") for j, series in enumerate(next(iter(rows.values())))]
    chart = svg("".join(parts), width=WIDTH, height=height, label=label)
    return f'<p class="unit">{escape(label)}</p>{chart}{legend(keys)}'


def bars(rows: Mapping[str, Mapping[str, float]], *, label: str) -> str:
    """One row per name: its series end to end from 0, and their sum in figures.

    Args:
        rows: {row: {series: value >= 0}}.
        label: what is measured, with its unit.
    """
    scale = ticks(0.0, max(sum(row.values()) for row in rows.values()), count=5)
    height = len(rows) * ROW + 30

    def px(value: float) -> float:
        return NAMES + value / scale[-1] * (WIDTH - NAMES - 60)

    parts = row_scale([(px(tick), number(tick)) for tick in scale], height=height)
    for i, (name, row) in enumerate(rows.items()):
        y, at = i * ROW + 12, 0.0
        parts.append(row_name(name, y=y + 13))
        for j, (series, value) in enumerate(row.items()):
            title = f"<title>{escape(name)}, {escape(series)}: {value:,}</title>"
            width = px(at + value) - px(at)
            parts.append(f'<rect class="s{j}" x="{px(at):.2f}" y="{y}" width="{width:.2f}" height="18">{title}</rect>')
            at += value
        parts.append(f'<text x="{px(at) + 6:.1f}" y="{y + 13}">{number(float(f"{at:.3g}"))}</text>')
    keys = [(series, f"s{j}") for j, series in enumerate(next(iter(rows.values())))]
    chart = svg("".join(parts), width=WIDTH, height=height, label=label)
    return f'<p class="unit">{escape(label)}</p>{chart}{legend(keys)}'


def histograms(rows: Mapping[str, Mapping[int, int]], *, label: str) -> str:
    """One row per name: how its total spreads over powers of two, heights on one scale for all rows.

    Args:
        rows: {row: {k: how many of 2^k to 2^(k+1) - 1}}; rows that count nothing are left out.
        label: what the buckets measure.

    Returns:
        markup, "" if there is nothing to draw.
    """
    shares = {
        name: {k: count / sum(row.values()) for k, count in row.items() if count}
        for name, row in rows.items()
        if any(row.values())
    }
    if not shares:
        return ""
    powers = [k for row in shares.values() for k in row]
    low, high, top = min(powers), max(powers) + 1, max(max(row.values()) for row in shares.values())
    height = len(shares) * ROW + 30

    def px(k: float) -> float:
        return NAMES + (k - low) / (high - low) * (WIDTH - NAMES - 24)

    step = -(-(high - low) // 9)
    parts = row_scale([(px(k), _binary(k)) for k in range(low, high + 1, step)], height=height)
    for i, (name, row) in enumerate(shares.items()):
        base = (i + 1) * ROW + 2
        parts.append(row_name(name, y=base - 4))
        parts.append(f'<line class="axis" x1="{NAMES}" x2="{px(high):.1f}" y1="{base}" y2="{base}"/>')
        for k, share in sorted(row.items()):
            tall = share / top * (ROW - 6)
            title = f"<title>{escape(name)}, {1 << k:,} to {(2 << k) - 1:,}: {rows[name][k]:,} ({share:.1%})</title>"
            parts.append(
                f'<rect class="s0" x="{px(k) + 0.5:.2f}" y="{base - tall:.2f}" width="{px(k + 1) - px(k) - 1:.2f}" '
                f'height="{tall:.2f}">{title}</rect>'
            )
    chart = svg("".join(parts), width=WIDTH, height=height, label=label)
    return f'<p class="unit">{escape(label)}; the tallest bar is {top:.0%} of its row</p>{chart}'


def heat_map(grid: Sequence[Sequence[float]], *, top: float, label: str) -> str:
    """Cells coloured in nine levels from 0 to `top` and above; rows from the top, one path per level.

    Args:
        grid: [rows][columns] of numbers >= 0.
        top: value of the strongest colour.
        label: what a screen reader says.
    """
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(grid):
        start = 0
        levels = [min(LEVELS - 1, int(value / top * LEVELS)) for value in row]
        for x in range(1, len(levels) + 1):
            if x == len(levels) or levels[x] != levels[start]:
                paths.setdefault(levels[start], []).append(f"M{start} {y}h{x - start}v1h{start - x}z")
                start = x
    body = "".join(f'<path class="h{level}" d="{"".join(cells)}"/>' for level, cells in sorted(paths.items()))
    size = f"0 0 {len(grid[0])} {len(grid)}"
    return (
        f'<svg class="heat" viewBox="{size}" preserveAspectRatio="none" shape-rendering="crispEdges" role="img" '
        f'aria-label="{escape(label)}">{body}</svg>'
    )


def legend(keys: Sequence[tuple[str, str]]) -> str:
    """A row of colour keys: [(label, class)]."""
    items = "".join(f'<li><i class="{style}"></i>{escape(label)}</li>' for label, style in keys)
    return f'<ul class="legend">{items}</ul>'


def ticks(low: float, high: float, *, count: int) -> list[float]:
    """About `count` round numbers that enclose [low, high]; the step is 1, 2 or 5 times a power of ten."""
    low, high = _widened(low, high)
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range itself, or one around it where it is too narrow to divide by."""
    room = max(abs(low), abs(high), 1e-3) * 1e-6
    return (low, high) if high - low > room else (low - max(room, 0.5), high + max(room, 0.5))


def number(value: float) -> str:
    """A tick's text: 1500 is 1.5k, 0.25 stays, 0.00015 is 1.5e-4."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:g}"


def _binary(k: int) -> str:
    """2^k as a tick's text: 2^12 is 4k."""
    return f"{1 << k % 10}{('', 'k', 'M', 'G', 'T')[k // 10]}"


def grid_line(y: float, text: str) -> str:
    """A line across a chart of axes, with its text at the left."""
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="end" x="{LEFT - 7}" y="{y + 4:.1f}">{text}</text>'


def row_scale(marks: Sequence[tuple[float, str]], *, height: int) -> list[str]:
    """Vertical grid lines of a chart of rows, each with its text below: [(x, text)]."""
    return [
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 26}"/>'
        f'<text class="mid" x="{x:.1f}" y="{height - 8}">{text}</text>'
        for x, text in marks
    ]


def row_name(name: str, *, y: float) -> str:
    """A row's name beside it, cut to fit the column."""
    shown = name if len(name) <= 13 else name[:12] + "…"
    return f'<text class="end" x="{NAMES - 10}" y="{y:.1f}">{escape(shown)}</text>'


def svg(body: str, *, width: int, height: int, label: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
