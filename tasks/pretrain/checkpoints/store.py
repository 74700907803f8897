"""Where checkpoints lie, which are whole, and how one goes.

checkpoints/
  step-00000016/         DeepSpeed's files, rng-<rank>.json, and state.json: the loop's state, the settings, the world
                         size, bytes and xxh3-128 of every file and of itself. All of it is on the disk before the
                         folder gets this name
  latest.json            {"tag": …} of the newest, for people and scripts: checkpoints are found without it
  .tmp-…                 one being written, converted or deleted, or left by a crash; deleted at the next start
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from tasks import scratch
from tasks.pretrain.job import TrainingError

STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_PIECE = 1 << 24  # bytes read at once


def tag(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08}"


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints, oldest first."""
    matches = [_NAME.fullmatch(path.name) for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def find(folder: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint that is whole by names and sizes, with its `tag`; None if there is none.

    Raises:
        TrainingError: there are checkpoints, and all are damaged.
    """
    return newest(folder, steps(folder), damage=lambda path: damage(path, content=False))[0]


def read(folder: Path, step: int) -> dict[str, Any]:
    """The state of one checkpoint, with its `tag`. Raises TrainingError if it is missing or damaged by its looks."""
    path = folder / tag(step)
    if step not in (present := steps(folder)):
        raise TrainingError(
            f"{folder} has no checkpoint of step {step}; kept: {', '.join(map(str, present)) or 'none'}"
        )
    if problem := damage(path, content=False):
        raise TrainingError(f"{path} is damaged: {problem}; kept: {', '.join(map(str, present))}")
    return state(path)


def sweep(folder: Path, newest: dict[str, Any] | None) -> None:
    """Delete what a crash left, and the damaged checkpoints that were passed over for the newest whole one."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for step in steps(folder):
        if newest is not None and step > newest["step"]:
            delete(folder / tag(step))


def newest(
    folder: Path, present: Sequence[int], *, damage: Callable[[Path], str | None]
) -> tuple[dict[str, Any] | None, list[str]]:
    """The state of the newest whole checkpoint, and what to say of those passed over.

    Args:
        present: the steps that there are, oldest first.
        damage: what is wrong with a checkpoint.

    Raises:
        TrainingError: all are damaged.
    """
    problems: list[str] = []
    for step in reversed(present):
        path = folder / tag(step)
        problem = damage(path)
        if problem is None:
            passed = [f"{each}; going on from the checkpoint of step {step} instead" for each in problems]
            return state(path), passed
        problems.append(f"{path} is damaged: {problem}")
    if problems:
        raise TrainingError(
            f"no whole checkpoint is there ({'; '.join(problems)}). Put the files back, or start over: "
            "`python -m tasks.pretrain PIPELINE --discard`, then run again"
        )
    return None, []


def state(path: Path) -> dict[str, Any]:
    """The state in a whole checkpoint, with its `tag`."""
    saved = scratch.read_sealed(path / STATE)
    del saved["files"]
    return {**saved, "tag": path.name}


def damage(
    path: Path, *, content: bool = True, log: Path | None = None, rank: int = 0, world_size: int = 1
) -> str | None:
    """What is wrong with a checkpoint; None if nothing is.

    Args:
        content: hash the files; else only names and sizes are looked at, and the state.
        log: the log whose beginning the checkpoint goes on from, to be looked at as well.
        rank: which share of the files to hash, of `world_size`.

    Raises:
        PermissionError: it may not be read, which says nothing about it.
    """
    try:
        saved = scratch.read_sealed(path / STATE)
        files: dict[str, dict[str, Any]] = saved["files"]
        if tag(saved["step"]) != path.name:
            return f"{STATE} is of step {saved['step']}"
        for name, entry in files.items():
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes of {entry['bytes']}"
        # DeepSpeed's converter and the export read whatever is there of these
        if strange := sorted(file.name for file in path.glob("*.pt") if file.name not in files):
            return f"{strange[0]} is not of this checkpoint"
        if log is not None and rank == 0 and saved.get("log") and _differs(log, saved["log"]):
            return f"{log} is not the log that it goes on from: its first {saved['log']['bytes']} bytes have changed"
        for name in sorted(files)[rank::world_size] if content else ():
            if _differs(path / name, files[name]):
                return f"{name}: {_record(path / name)}its content has changed since it was written"
    except PermissionError:
        raise
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:  # of the disk, with the file's name
        return str(error)
    except (ValueError, KeyError, TypeError) as error:
        return f"{STATE} cannot be read ({error})"
    return None


def _differs(file: Path, entry: dict[str, Any]) -> bool:
    """Whether the first `bytes` of a file are other ones than those of an entry {bytes, xxh3_128}."""
    digest, left = xxhash.xxh3_128(), entry["bytes"]
    with file.open("rb") as source:
        while piece := source.read(min(_PIECE, left)):
            digest.update(piece)
            left -= len(piece)
    return bool(left > 0 or digest.hexdigest() != entry["xxh3_128"])


def _record(file: Path) -> str:
    """Which record of torch's archive does not fit its checksum, for a message; empty if that cannot be told."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except Exception:  # a broken archive fails in many ways
        return ""
    return f"record {bad}: " if bad else ""


def point(folder: Path, step: int) -> None:
    """Bring a new checkpoint's name to the disk, and name it in latest.json."""
    scratch.fsync(folder)
    scratch.write_json(folder / "latest.json", {"tag": tag(step)})


def delete(path: Path) -> None:
    """Delete a checkpoint; stopped in between, it leaves nothing that looks like one."""
    gone = path.with_name(f".tmp-gone-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)
