"""Charts of domain weights: shares with their spread, and predicted against measured losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from tasks.evaluate.report import charts


def shares(rows: Mapping[str, Mapping[str, float]], *, spread: Mapping[str, float], label: str) -> str:
    """One row per domain, one dot per method; a line through the first method's dot reaches one spread to each side.

    Args:
        rows: {domain: {method: share}}.
        spread: {domain: standard deviation of the first method's share}; empty if it has none.
        label: what is measured.
    """
    reach = [share + spread.get(name, 0.0) for name, row in rows.items() for share in row.values()]
    scale = charts.ticks(0.0, max(reach), count=6)
    height = len(rows) * charts.ROW + 30

    def px(value: float) -> float:
        return charts.NAMES + max(value, 0.0) / scale[-1] * (charts.WIDTH - charts.NAMES - 24)

    parts = charts.row_scale([(px(tick), charts.number(tick)) for tick in scale], height=height)
    for i, (name, row) in enumerate(rows.items()):
        y = i * charts.ROW + charts.ROW / 2 + 4
        parts.append(charts.row_name(name, y=y + 4))
        first = next(iter(row.values()))
        if sd := spread.get(name):
            left, right = px(first - sd), px(first + sd)
            parts.append(f'<line class="span" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for j, (method, share) in reversed(list(enumerate(row.items()))):
            title = f"<title>{escape(name)}, {escape(method)}: {share:.3f}</title>"
            parts.append(f'<circle class="m{j} dot" cx="{px(share):.1f}" cy="{y:.1f}" r="6.5">{title}</circle>')
    keys = [(method, f"m{j}") for j, method in enumerate(next(iter(rows.values())))]
    chart = charts.svg("".join(parts), width=charts.WIDTH, height=height, label=label)
    return f'<p class="unit">{escape(label)}</p>{chart}{charts.legend(keys)}'


def agreement(predicted: Sequence[float], measured: Sequence[float], *, label: str) -> str:
    """A dot for each held-out mix at (predicted, measured), and the line on which both are equal.

    Args:
        predicted, measured: losses of the same mixes, in the same order; one at least.
        label: their unit.
    """
    values = [*predicted, *measured]
    scale = charts.ticks(min(values), max(values), count=5)
    low, high = scale[0], scale[-1]
    bottom, right = charts.HEIGHT - charts.BOTTOM, charts.WIDTH - charts.RIGHT

    def px(value: float) -> float:
        return charts.LEFT + (value - low) / (high - low) * (right - charts.LEFT)

    def py(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - charts.TOP)

    parts = [charts.grid_line(py(tick), charts.number(tick)) for tick in scale]
    parts += [f'<text class="mid" x="{px(tick):.1f}" y="{bottom + 17}">{charts.number(tick)}</text>' for tick in scale]
    parts.append(f'<text class="end" x="{right}" y="{charts.HEIGHT - 4}">predicted</text>')
    parts.append(f'<path class="faint" d="M{px(low):.1f} {py(low):.1f}L{px(high):.1f} {py(high):.1f}"/>')
    for x, y in zip(predicted, measured, strict=True):
        title = f"<title>predicted {x:.4f}, measured {y:.4f}</title>"
        parts.append(f'<circle class="s0" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5">{title}</circle>')
    chart = charts.svg("".join(parts), width=charts.WIDTH, height=charts.HEIGHT, label="measured by predicted loss")
    return f'<p class="unit">measured, {escape(label)}</p>{chart}'
