"""Files that appear whole or not at all, and stay when the power fails."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TMP = ".tmp-"
_FIXES = {
    errno.ENOMEM: "free memory, or raise the limit (ulimit -v, sysctl vm.max_map_count)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (sysctl fs.file-max)",
    errno.EACCES: "give yourself the right to read it",
    errno.EPERM: "give yourself the right to read it",
}
"""Errors that say something of the machine and nothing of a file, and the fix of each."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its name when the block ends without an error, and is deleted otherwise.

    Reaches the disk before it gets its name, and the name before this returns. Any number of writers may write the
    same bytes at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}{TMP}{uuid.uuid4().hex}")
    try:
        with staging.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    except BaseException as error:
        staging.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk: the error of a write names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def machine_error(error: BaseException, path: Path | str) -> OSError | None:
    """The error to raise where reading failed by the machine's fault, not by the file's; None where it may be."""
    code = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    if code not in _FIXES:
        return None
    text = f"{os.strerror(code)}, while it was opened or read; nothing is known to be wrong with it: {_FIXES[code]}"
    return OSError(code, text, str(path))


def raise_machine_error(error: BaseException, path: Path | str) -> None:
    """Raise the `machine_error` of an error, if it is one."""
    if (cause := machine_error(error, path)) is not None:
        raise cause from error


def sweep(folder: Path) -> None:
    """Delete what writers that were killed left behind. Nobody else may write there meanwhile."""
    for orphan in folder.rglob(f"*{TMP}*"):
        orphan.unlink(missing_ok=True)
