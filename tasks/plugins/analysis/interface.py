"""What an analysis is: a function from one sparse layer to its figures, and what the page says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tasks.plugins.analysis.layer import Layer

Needs = Literal["weights", "text", "another model"]
"""weights: the checkpoint alone; text: windows too; another model: windows, and a second checkpoint beside it."""
LARGEST = 32
"""Experts of which a matrix of all pairs is written; of more, the figures that sum it up are."""
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one layer gives."""

    curves: Mapping[str, Mapping[str, float | None]]
    """{chart: {series: value}}: drawn by layer, and averaged over the layers where they are defined."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """What else goes into the file; numbers, lists and arrays."""
    undefined: str = ""
    """Why a value is None."""


@dataclass(frozen=True, kw_only=True)
class Map:
    """A table of numbers >= 0 that the page draws in colours."""

    title: str
    grid: Any
    """[rows][columns]."""
    top: float
    """The value of the strongest colour."""
    caption: str
    rows: tuple[str, ...] = ()
    """Names of the rows; none where they are numbered like the columns."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """One analysis. `maps` draws from {layer: its detail}, of at least one layer."""

    title: str
    note: str
    """What the figures mean, in a sentence or two."""
    needs: Needs
    measure: Callable[[Layer], Figures]
    maps: Callable[[Mapping[int, Mapping[str, Any]]], list[Map]] = lambda details: []


def plain(value: Any) -> Any:
    """Numbers, arrays and what holds them as JSON has it: rounded to six digits, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value


def defined(value: float) -> float | None:
    """The value, or None where it is not a number."""
    return float(value) if math.isfinite(value) else None


def small(values: np.ndarray) -> list[Any] | None:
    """A matrix of pairs of experts, or None where there are more than LARGEST."""
    return plain(values) if len(values) <= LARGEST else None
