"""The settings `evaluate.analyses` and `evaluate.analysis_windows`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from tasks.settings.fields import Name, Positive

MEASURES = Path(__file__).parent / "measures"
"""The analyses, a file each."""


def _known(names: list[str]) -> list[str]:
    known = sorted(path.stem for path in MEASURES.glob("[a-z]*.py"))
    if names == ["all"]:
        return known
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(repeated)} stands there twice")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{', '.join(unknown)} is not known; known: all, {', '.join(known)}")
    return names


FIELDS = {
    "evaluate": {
        "analyses": (Annotated[list[Name], AfterValidator(_known)], Field(default_factory=list)),
        "analysis_windows": (Positive, 1),
    }
}
"""Analyses by name, or [all]; test windows of each domain that they read."""
