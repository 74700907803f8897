"""Which names lm-eval knows: the same answer as its TaskManager's in a tenth of the time, and nothing is imported.

lm-eval's own tasks are YAML files with a `task:` or a `group:` at the top; a `tag:` is a name for several tasks.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path

LOCAL = Path(__file__).parent.parent / "evaluate" / "downstream" / "harness"
"""Descriptions of tasks that lm-eval has not, one NAME.yaml each."""
FOLDER = "tasks/evaluate/downstream/harness"
"""LOCAL as messages name it."""
FORMATS = {"json", "text", "csv", "parquet"}
"""Values of dataset_path that stand for local files."""

_NAME = re.compile(rb"""^["']?(task|group)["']?:[ \t]*["']?([\w.+-]+)["']?[ \t]*(?:#.*)?\r?$""", re.MULTILINE)
_TAGS = re.compile(rb"""^["']?tag["']?:[ \t]*(.*\n?(?:[ \t]*-.*\n?)*)""", re.MULTILINE)
_FIELD = re.compile(rb"""^(\w+_split|dataset_path):[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
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
        + f", or give a `source` and describe it in {FOLDER}/"
    )


def why_no_items(name: str, files: Iterable[str]) -> str | None:
    """Why a task has no items where these are the splits that have files, or none has; None if it has them.

    What is on the hub is not looked at.
    """
    files, path = set(files), description(name)
    if not files:
        if path is None or path.parent != LOCAL:
            return why_not(name)
        if fields(path).get("dataset_path") in FORMATS:
            return f"{FOLDER}/{name}.yaml describes it over a local file; give its `source` or `files`"
        return None
    if path is None:
        if why_not(name) is None:
            return "is a group of lm-eval, and files belong to a task; name its tasks"
        known = ", ".join(sorted(path.stem for path in LOCAL.glob("*.yaml"))) or "none"
        return (
            f"it has a `source`, so {FOLDER}/{name}.yaml must describe it; described: {known}. For a "
            "task of the hub leave `source` out"
        )
    read = splits(path)
    if unknown := sorted(files - set(read.values())):
        named = ", ".join(dict.fromkeys(read.values())) or "none"
        return f"files: its description reads no split {unknown[0]!r}; the splits that it reads: {named}"
    judged = [read[field] for field in ("test_split", "validation_split") if field in read]
    if not files & set(judged):
        return f"files: its items are those of the split {judged[0]!r}, which has no file"
    return None


def description(name: str) -> Path | None:
    """The file that describes a task: LOCAL/NAME.yaml, or lm-eval's own; None of groups."""
    local = LOCAL / f"{name}.yaml"
    return local if local.is_file() else _names()[0].get(name)


def splits(path: Path) -> dict[str, str]:
    """The splits that a description reads, by field, such as {test_split: test}."""
    return {field: value for field, value in fields(path).items() if field.endswith("_split") and value != "null"}


def fields(path: Path) -> dict[str, str]:
    """dataset_path and the names of splits in a description; its own before those of what it includes."""
    text = path.read_bytes()
    own = {field.decode(): value.decode() for field, value in _FIELD.findall(text)}
    included = _INCLUDE.search(text)
    base = path.parent / included[1].decode() if included else path
    return fields(base) | own if base != path and base.is_file() else own


@functools.cache
def _names() -> tuple[dict[str, Path], dict[str, bool], dict[str, list[str]]]:
    """lm-eval's tasks and their files; its groups, and whether they have a score; its tags and the tasks of each."""
    tasks: dict[str, Path] = {}
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
                tasks[task] = path
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
