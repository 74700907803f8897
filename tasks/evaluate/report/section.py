"""A section of the page: a title, notes, charts and tables. page.py lists the modules that make one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with its title; `chart` is markup of charts.py."""

    title: str
    chart: Markup
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under the titles of their columns.

    groups: [{title, basis, rows: [(label, a cell per column)]}]; without a title a group has rows alone.
    """

    columns: Sequence[str]
    groups: Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """What section.html.j2 draws, in this order. `backticks` in notes mark code; everything is escaped but charts."""

    title: str
    notes: Sequence[str] = ()
    lead: str = ""
    """The note that is set larger, before the others."""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
