"""The registry of optional features: what the core asks instead of naming one.

A plug-in is a folder `tasks/plugins/<name>/`. Each of its files with a name from `SEAMS` fills the seam of that name;
a missing file fills none. Deleting the folder, its tests and its entries in pipelines.yaml deletes the feature.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parent / "plugins"
SEAMS: Mapping[str, str] = {
    "filter": "Rule, a settings model with a field `rule`, and make_filter(rule), which gives a TextFilter",
    "block": "an MoE block of training: read, swap_in, take_out, write, to_stock of tasks/moe/block.py",
    "commands": "COMMANDS {name: (function, example)}: commands of moeforge, with typer's annotations",
    "engine": "prepares(config), configuration, check, conversion, prepare, full_weights, read: another engine",
    "reader": "Reader, a class as of tasks/corpus/readers/base.py; its format has the plug-in's name",
    "hooks": "hooks(trainer) -> [Hook]: what happens around a training step; prepare(model, job)",
    "figures": "measure(subject) -> JSON, of what evaluate measures (tasks/evaluate/details.py)",
    "section": "section(content, titles) -> HTML, of what `figures` measured",
    "settings": "FIELDS {section: {field: (annotation, default)}}, CHOICES {field: values}, DEFAULTS {section: "
    "function(entry) -> values}, faults(pipeline, …), warnings(pretrain)",
    "estimator": "estimate(problem) of domain weights; trainings(mixture), forward_tokens(mixture, proxy, …) for plan",
    "swarm": "plan(problem), complete(plan, run=…), processes(count): proxy runs to share out; of one plug-in",
    "method": "a partition method, registered by tasks.partition.methods.method",
    "cost": "trainings(pipeline): {title: settings} of trainings of the parent before it is pruned",
    "control": "make(entry, control, job, …), steps(work), publish(work, …): a pruned baseline by another method",
}
"""{file name: what the core reads of the module}."""


@functools.cache
def names() -> tuple[str, ...]:
    """The plug-ins of this installation, sorted."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/__init__.py")))


@functools.cache
def modules(seam: str) -> Mapping[str, ModuleType]:
    """{plug-in: its module for a seam}, of the plug-ins that have one. Imports them.

    Raises:
        KeyError: there is no such seam.
    """
    if seam not in SEAMS:
        raise KeyError(f"{seam!r} is no seam; seams: {', '.join(SEAMS)}")
    return {name: importlib.import_module(f"tasks.plugins.{name}.{seam}") for name in having(seam)}


def having(seam: str) -> tuple[str, ...]:
    """The plug-ins that fill a seam, sorted. Imports none."""
    return tuple(name for name in names() if (FOLDER / name / f"{seam}.py").is_file())


def fields(section: str) -> dict[str, Any]:
    """{field: (annotation, default)} that plug-ins add to a section of the settings, such as `pretrain`.

    Raises:
        ValueError: two plug-ins add the same field.
    """
    found: dict[str, Any] = {}
    for name, module in modules("settings").items():
        for field, definition in getattr(module, "FIELDS", {}).get(section, {}).items():
            if field in found:
                raise ValueError(f"tasks/plugins/{name}/settings.py: another plug-in has {section}.{field} already")
            found[field] = definition
    return found


def choices(field: str) -> tuple[str, ...]:
    """The values that plug-ins add to a setting with a fixed set of values, such as `mixture.method`."""
    found = (getattr(module, "CHOICES", {}).get(field, ()) for module in modules("settings").values())
    return tuple(value for values in found for value in values)


def owner(field: str, value: str) -> str | None:
    """The plug-in that adds `value` to such a setting; None for a value of the core."""
    for name, module in modules("settings").items():
        if value in getattr(module, "CHOICES", {}).get(field, ()):
            return name
    return None
