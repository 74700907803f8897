"""One message for an error that ends a command, with the fix; the traceback of an unexpected one goes into a file."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path

OURS = {"flows", "tasks", "moe_kernels"}
TRACE = Path(".scratch", "traceback.txt")
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def message(error: Exception) -> str:
    """One message for an error that ends a command: our own unchanged, the system's with the fix."""
    package = type(error).__module__.partition(".")[0]
    if package in OURS:
        return str(error)
    if isinstance(error, OSError):
        return _system(error)
    if package in {"prefect", "httpx", "httpcore"}:
        said = str(error).splitlines()[:1] or [type(error).__name__]
        url = os.environ.get("PREFECT_API_URL", "the address in prefect.toml")
        return (
            f"Prefect's server at {url}: {said[0]}; see that it runs and is not overloaded, then run again. "
            "Finished stages are kept"
        )
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'} ({_keep(error)})"


def _system(error: OSError) -> str:
    if error.errno is None:
        return str(error)
    said = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if error.errno in CLOSED:
        return f"{said}; let this user read and write there, or work in a copy of the project"
    if error.errno in FULL:
        return f"{said}; make room (`dvc gc --workspace` drops old results), then run again"
    return said


def _keep(error: Exception) -> str:
    """Write the traceback to a file. Returns its path, or the traceback if no file can be written."""
    text = "".join(traceback.format_exception(error))
    try:
        TRACE.parent.mkdir(exist_ok=True)
        TRACE.write_text(text)
    except OSError:
        return f"the traceback cannot be written to a file:\n{text}"
    return f"unexpected; the traceback is in {TRACE}"
