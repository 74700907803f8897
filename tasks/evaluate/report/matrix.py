"""A table of numbers as coloured cells with named rows, in the colours of `charts.heat_map`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tasks.evaluate.report import charts

_WIDTH, _NAMES = 480, 140
_MOST_LETTERS = 20  # of a name, which fit the column
_CELL = 30  # at most
_BELOW = 24
_MOST_MARKS = 12


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
