"""What plug-ins measure beside the figures of the core: the content of details.json.

A plug-in's `figures.py` has `measure(subject)`, which returns JSON or {}; its `section.py` has
`section(content, titles)`, which draws that as HTML.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import plugin

if TYPE_CHECKING:
    import numpy as np
    from markupsafe import Markup

    from tasks.settings import Evaluate


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The sparse checkpoints to measure, and on what."""

    models: Mapping[str, Path]
    """{key: folder}: one, or two of the same experts, the earlier one first."""
    windows: Callable[[int], Mapping[str, np.ndarray]]
    """At most so many test windows of each domain: {domain: int [B, L]}."""
    settings: Evaluate
    folder: Path
    """For unfinished work, by which a killed measurement goes on."""
    parent: Path | None = None
    """The dense checkpoint that the experts were cut from."""
    index: Path | None = None
    """partition.safetensors."""


def measure(subject: Subject) -> dict[str, Any]:
    """{plug-in: what it measures}, of the plug-ins that measure something."""
    results = {
        name: module.measure(dataclasses.replace(subject, folder=subject.folder / name))
        for name, module in plugin.modules("figures").items()
    }
    return {name: content for name, content in results.items() if content}


def sections(details: Mapping[str, Any], titles: Mapping[str, str]) -> list[Markup]:
    """The sections of the plug-ins that measured something; titles: {key of a model: its title}."""
    modules = plugin.modules("section")
    return [modules[name].section(content, titles) for name, content in details.items() if name in modules]
