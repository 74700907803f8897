"""Which names lm-eval knows: the same answer as its TaskManager's in a tenth of the time, and nothing is imported.

lm-eval's own tasks are YAML files with a `task:` or a `group:` at the top; a `tag:` is a name for several tasks.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from importlib import metadata, util
from pathlib import Path

LOCAL = Path(__file__).parent.parent / "evaluate" / "harness"
"""Descriptions of the tasks over local files, one NAME.yaml each."""

_NAME = re.compile(rb"""^["']?(task|group)["']?:[ \t]*["']?([\w.+-]+)["']?[ \t]*(?:#.*)?\r?$""", re.MULTILINE)
_TAGS = re.compile(rb"""^["']?tag["']?:[ \t]*(.*\n?(?:[ \t]*-.*\n?)*)""", re.MULTILINE)
_INCLUDE = re.compile(rb"""^["']?include["']?:[ \t]*["']?([^\s"']+)""", re.MULTILINE)
_WORD = re.compile(rb"[\w.+-]*\w")


def why_not(name: str) -> str | None:
    """Why lm-eval has no score of a task called `name` in its own collection; None if it has one."""
    tasks, groups, tags = _names()
    version = metadata.version("lm_eval")
    if name in tasks or groups.get(name):
        return None
    if name in groups:
        return f"is a group of lm-eval {version} whose tasks have no common score; name its tasks"
    if name in tags:
        return (
            f"is a tag of lm-eval {version} for several tasks; name those that you want: {', '.join(tags[name][:8])}"
        )
    near = difflib.get_close_matches(name, [*tasks, *groups], n=3)
    return (
        f"is no task of lm-eval {version}; "
        + (f"did you mean {' or '.join(near)}? Correct the name" if near else "correct the name")
        + ", or give a `source` and describe it in tasks/evaluate/harness/"
    )


def not_described(name: str) -> str | None:
    """What is missing of a task over a local file; None if LOCAL/NAME.yaml describes it."""
    if (LOCAL / f"{name}.yaml").is_file():
        return None
    known = ", ".join(sorted(path.stem for path in LOCAL.glob("*.yaml"))) or "none"
    return (
        f"it has a `source`, so tasks/evaluate/harness/{name}.yaml must describe it; described: {known}. For a task "
        "of the hub leave `source` out"
    )


@functools.cache
def _names() -> tuple[set[str], dict[str, bool], dict[str, list[str]]]:
    """lm-eval's tasks; its groups, and whether their tasks have a common score; its tags and the tasks of each."""
    tasks: set[str] = set()
    groups: dict[str, bool] = {}
    tags: dict[str, list[str]] = {}
    spec = util.find_spec("lm_eval")
    for root in spec.submodule_search_locations or () if spec else ():
        paths = (Path(folder, file) for folder, _, files in os.walk(Path(root, "tasks")) for file in files)
        for path in paths:
            if path.suffix != ".yaml":
                continue
            text = path.read_bytes()
            kinds = {kind: name.decode() for kind, name in _NAME.findall(text)}
            if (group := kinds.get(b"group")) and b"task" not in kinds:  # with both, it is a task in Python
                groups[group] = b"aggregate_metric_list" in text
            elif task := kinds.get(b"task"):
                tasks.add(task)
                for tag in _tags(path):
                    tags.setdefault(tag, []).append(task)
    return tasks, groups, tags


@functools.cache
def _tags(path: Path) -> tuple[str, ...]:
    """The tags of a description, or of the one that it includes."""
    text = path.read_bytes()
    if own := _TAGS.search(text):
        return tuple(word.decode() for word in _WORD.findall(own[1]))
    included = _INCLUDE.search(text)
    base = path.parent / included[1].decode() if included else path
    return _tags(base) if base != path and base.is_file() else ()
