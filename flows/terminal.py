"""How a command ends and what it prints: tables, and one message for an error."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import typer

from flows import errors

if TYPE_CHECKING:
    from rich.console import RenderableType

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
        fail(errors.message(error))


def show(what: RenderableType) -> None:
    """Print a table or text; full width where nobody looks at a terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(what)


def fail(message: str, *, code: int = 1) -> NoReturn:
    """Print an error and end."""
    print(f"moeforge: {message}", file=sys.stderr)
    raise typer.Exit(code)
