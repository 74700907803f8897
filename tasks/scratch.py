"""Workspaces of unfinished work, one writer at a time, and atomic publication of finished results.

DVC deletes a stage's outs before it runs the stage. So unfinished work stays in
`.scratch/<stage>-<name>/<fingerprint>/`, and a finished result is renamed to its final path. At most one workspace of
work that was begun with other inputs is kept beside the present one, until the present work is finished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

ROOT = Path(".scratch")
_SEAL = "xxh3_128"
_FINGERPRINT = re.compile("[0-9a-f]{16}")


class BusyError(RuntimeError):
    """Another process works on the same thing."""


@contextmanager
def workspace(
    stage: str,
    name: str,
    *,
    inputs: Any = None,
    shared: bool = False,
    priority: Callable[[Path], float] | None = None,
) -> Iterator[Path]:
    """Yield the scratch folder of one unit of work, held until the block ends.

    Args:
        stage: the stage's name, such as `pretrain`.
        name: what it works on: a model, corpus or pipeline.
        inputs: JSON-able parameters and digests; work begun with other inputs is not continued, and is deleted.
        shared: let others that also pass `shared` hold it at the same time; nothing is deleted then.
        priority: rates a folder of work that was begun with other inputs; 0 means worthless. The folder with the
            highest priority is kept, so that its work continues if its inputs come back. It is deleted when the
            present work is finished, that is, when the yielded folder no longer exists at the end of the block.
            None: no other folder is kept.

    Raises:
        BusyError: another process holds it. The lock dies with its process, so kill -9 leaves none behind.
    """
    base = ROOT / f"{stage}-{name}"
    base.mkdir(parents=True, exist_ok=True)
    with (base / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise BusyError(
                f"{stage} {name} is already being run by process {', '.join(lock.read().split()) or '(unknown)'}; "
                "wait for it or stop it, then run again. Nothing was changed"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()} ")  # those who share it may write at once
        lock.flush()
        folder = base / fingerprint(inputs)
        if not shared:
            _drop(others(folder), priority=priority)
        folder.mkdir(exist_ok=True)
        os.utime(folder)  # for `last_used`
        yield folder
        if not shared and not folder.exists():
            _drop(others(folder), priority=None)


def others(folder: Path) -> list[Path]:
    """The folders beside a workspace: work begun with other inputs."""
    return [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]


def report_kept(folder: Path) -> None:
    """Print where work begun with other inputs is kept beside a workspace."""
    for other in others(folder):
        print(
            f"the inputs have changed; the work with the previous inputs is kept in {other} until this run finishes, "
            "and continues if those inputs come back. Delete it to free the space",
            flush=True,
        )


def last_used(folder: Path) -> float:
    """The time at which a workspace was last used, as its priority."""
    return folder.stat().st_mtime


def _drop(folders: list[Path], *, priority: Callable[[Path], float] | None) -> None:
    """Delete folders, but the one with the highest priority above 0."""
    ratings = {folder: priority(folder) for folder in folders if priority and _FINGERPRINT.fullmatch(folder.name)}
    best = max(ratings, key=lambda folder: ratings[folder], default=None)
    for folder in folders:
        if folder != best or not ratings[folder]:
            shutil.rmtree(folder)


def fingerprint(inputs: Any) -> str:
    """16 hex digits of the SHA-256 of `inputs` as canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder."""
    if path.is_dir():
        lines = (f"{p.relative_to(path)}\0{digest(p)}\n" for p in sorted(path.rglob("*")) if p.is_file())
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(result: Path, target: Path) -> None:
    """Move a finished file or folder to `target` in one rename, replacing what stood there.

    Where the two are on different file systems, the copy is made beside `target`, and reaches the disk, before that
    rename. `result` is gone only after it.

    Raises:
        OSError: naming `target`, such as a full disk. `result` and what stood at `target` are as they were.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.publishing-*"):  # of a process that was killed here
        discard(stale)
    staging, aside = (target.with_name(f".{target.name}.publishing-{uuid.uuid4().hex}") for _ in range(2))
    ready = result
    try:
        if not _same_file_system(result, target.parent):
            ready = staging
            _copy(result, staging)
        if target.is_symlink():  # into DVC's cache, if it links
            target.unlink()
        if target.is_dir():
            target.rename(aside)
        try:
            ready.replace(target)
        except OSError as error:  # a bind mount or a subvolume: one device, and no renames across it
            if error.errno != errno.EXDEV:
                raise
            ready = staging
            _copy(result, staging)
            staging.replace(target)
    except OSError as error:
        if aside.exists() and not target.exists():
            aside.rename(target)
        discard(staging)
        why = f"{error.strerror or error}; the finished result is in {result}"  # shutil.Error has a list of reasons
        raise OSError(error.errno or errno.EIO, why, str(target)) from error
    discard(aside)
    if ready != result:
        discard(result)


def link(path: Path, target: Path) -> None:
    """Make a file of the same content at `target`: a hard link where that can be, else a copy."""
    try:
        os.link(path.resolve(), target)  # of the file itself, where DVC links into its cache by symbolic links
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP}:
            raise
        _copy(path.resolve(), target)


def discard(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Let the files of a folder, and their names, reach the disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            fsync(path)
    fsync(folder)


def fsync(path: Path) -> None:
    """Let the names in a folder, or the content of a file, reach the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _same_file_system(path: Path, other: Path) -> bool:
    return path.lstat().st_dev == other.stat().st_dev


def _copy(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, target, symlinks=True)
        sync(target)
    else:
        shutil.copy2(path, target)
        fsync(target)


def write_json(path: Path, value: Any) -> None:
    """Write JSON (sorted, indented) so that a reader finds the old or the new file, never half of one."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with staging.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except OSError as error:  # of a write on a full disk, which names no file
        staging.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as `write_json` does, with its own xxh3-128, by which `read_sealed` knows it again."""
    write_json(path, {**content, _SEAL: _seal(json.loads(json.dumps(content)))})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        ValueError: the file holds something else; the message says what.
        OSError: it is not there or cannot be read.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or _SEAL not in content:
        raise ValueError(f"it has no {_SEAL}: it is no such file, or older code wrote it")
    if content.pop(_SEAL) != _seal(content):
        raise ValueError("its content has changed since it was written")
    return content


def _seal(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
