"""Where checkpoints lie, which are whole, and how one goes.

checkpoints/
  latest.json            {"tag": …}, replaced in one rename once everything under the tag is on the disk
  step-00000016/         DeepSpeed's files, rng-<rank>.json, and state.json: the loop's state, the settings, the
                         world size, and the bytes of every file
  .tmp-…                 one being written, converted or deleted, or left by a crash; deleted at the next start
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tasks import scratch
from tasks.pretrain.job import TrainingError

STATE = "state.json"


def tag(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08}"


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints that `latest.json` stands for, oldest first."""
    pointer = folder / "latest.json"
    if not pointer.exists():
        return []
    newest = json.loads(pointer.read_text())["tag"]
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.name <= newest)


def find(folder: Path) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint, with its `tag`; None if there is none.

    Raises:
        TrainingError: there are checkpoints, and all are damaged.
    """
    return newest(folder)[0]


def read(folder: Path, step: int) -> dict[str, Any]:
    """The state of one checkpoint, with its `tag`. Raises TrainingError if it is missing or damaged."""
    path = folder / tag(step)
    if step not in (kept := steps(folder)):
        raise TrainingError(f"{folder} has no checkpoint of step {step}; kept: {', '.join(map(str, kept)) or 'none'}")
    if problem := _damage(path):
        raise TrainingError(f"{path} is damaged: {problem}; kept: {', '.join(map(str, kept))}")
    return _state(path)


def sweep(folder: Path, newest: dict[str, Any] | None) -> None:
    """Delete what a crash left, damaged checkpoints, and whole ones that the pointer does not know yet."""
    if newest is not None:
        point(folder, newest["step"])
    for path in [*folder.glob(".tmp-*"), *folder.glob("step-*")]:
        if path.name.startswith(".tmp-") or newest is None or path.name > newest["tag"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole checkpoint, and what to say of those passed over."""
    problems: list[str] = []
    for step in reversed(steps(folder)):
        path = folder / tag(step)
        problem = _damage(path)
        if problem is None:
            passed = [f"{each}; going on from the checkpoint of step {step} instead" for each in problems]
            return _state(path), passed
        problems.append(f"{path} is damaged: {problem}")
    if problems:
        raise TrainingError(
            f"no whole checkpoint is left ({'; '.join(problems)}). Put the files back, or start over: "
            "`python -m tasks.pretrain PIPELINE --discard`, then run again"
        )
    return None, []


def _state(path: Path) -> dict[str, Any]:
    state = json.loads((path / STATE).read_text())
    del state["files"]
    return {**state, "tag": path.name}


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, by name and size."""
    try:
        files = json.loads((path / STATE).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{STATE} cannot be read ({error})"
    for name, size in files.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def point(folder: Path, step: int) -> None:
    sync_folder(folder)  # the name before the pointer to it
    scratch.write_json(folder / "latest.json", {"tag": tag(step)})
    sync_folder(folder)


def delete(path: Path) -> None:
    """Delete a checkpoint; stopped in between, it leaves nothing that looks like one."""
    gone = path.with_name(f".tmp-gone-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
