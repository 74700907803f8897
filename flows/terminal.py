"""How a command ends and what it prints: tables, and one message for an error, with the fix.

The traceback of an unexpected error goes into a file.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

OURS = {"flows", "tasks", "moe_kernels"}
TRACE = Path(".scratch", "traceback.txt")
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
STOPPED = "stopped. Finished stages are kept; run again to go on"


class Terminated(BaseException):
    """SIGTERM arrived."""


def raise_on_sigterm() -> None:
    """Let SIGTERM raise Terminated. Prefect ends the stages first, then calls the handler that was there before."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handle)


@contextmanager
def clear_errors() -> Iterator[None]:
    """End with one message and exit code 1 instead of a traceback."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):  # the latter of `moeforge … | head`: typer ends without a word
        raise
    except KeyboardInterrupt:
        fail(STOPPED, code=130)
    except Terminated:
        fail(STOPPED, code=143)
    except Exception as error:
        fail(message(error))


def show(what: RenderableType) -> None:
    """Print a table or text; full width where nobody looks at a terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(what)


def fail(text: str, *, code: int = 1) -> NoReturn:
    """Print an error and end."""
    print(f"moeforge: {text}", file=sys.stderr)
    raise typer.Exit(code)


def message(error: Exception) -> str:
    """One message for an error that ends a command: our own unchanged, the system's with the fix."""
    package = type(error).__module__.partition(".")[0]
    if package in OURS:
        return str(error)
    if isinstance(error, OSError):
        return _system(error)
    if package in {"prefect", "httpx", "httpcore"}:
        lines = str(error).splitlines()[:1] or [type(error).__name__]
        url = os.environ.get("PREFECT_API_URL", "the address in prefect.toml")
        return (
            f"Prefect's server at {url}: {lines[0]}; see that it runs and is not overloaded, then run again. "
            "Finished stages are kept"
        )
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'} ({_keep(error)})"


def _system(error: OSError) -> str:
    if error.errno is None:
        return str(error)
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if error.errno in CLOSED:
        return f"{text}; let this user read and write there, or work in a copy of the project"
    if error.errno in FULL:
        return f"{text}; make room (`dvc gc --workspace` drops old results), then run again"
    return text


def _keep(error: Exception) -> str:
    """Write the traceback to a file. Returns its path, or the traceback if no file can be written."""
    text = "".join(traceback.format_exception(error))
    try:
        TRACE.parent.mkdir(exist_ok=True)
        TRACE.write_text(text)
    except OSError:
        return f"the traceback cannot be written to a file:\n{text}"
    return f"unexpected; the traceback is in {TRACE}"
