"""One display for everything that takes long: a live area on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

EVERY = 10.0  # seconds between plain lines of progress
_REFRESHES = 2  # a second
_BAR = 24


class Display:
    """A live area at the end of a terminal, and lines above it; without a terminal, the lines alone.

    It never ends a run: a line that the stream cannot take, because it is closed or cannot spell it, is lost.
    """

    def __init__(
        self,
        draw: Callable[[], RenderableType],
        *,
        stream: TextIO,
        terminal: bool | None = None,
        transient: bool = False,
    ) -> None:
        """
        Args:
            draw: the live area's content; a thread calls it, twice a second and at the end.
            stream: sys.stdout or sys.stderr.
            terminal: whether the stream is one, if it is not to be asked.
            transient: the live area disappears at the end.
        """
        self._draw, self._stream, self._transient = draw, stream, transient
        dumb = os.environ.get("TERM", "").lower() in {"dumb", "unknown"}
        self.on_terminal = stream.isatty() and not dumb if terminal is None else terminal
        self._live: Live | None = None
        self._shown = time.monotonic()

    def start(self) -> None:
        """Show the live area; on a terminal only, and once."""
        if self._live or not self.on_terminal:
            return
        from rich.console import Console
        from rich.live import Live

        # A display on stderr leaves stdout alone: it may be a pipe, and rich would send it to the terminal.
        self._live = Live(
            get_renderable=self._draw,
            console=Console(file=self._stream),
            refresh_per_second=_REFRESHES,
            transient=self._transient,
            redirect_stdout=self._stream is sys.stdout,
        )
        self._live.start()
        self._live.console.show_cursor(True)  # rich hides it, and kill -9 would leave it so

    def close(self) -> None:
        """Leave the last state on the terminal, unless transient. What is said from here on are plain lines."""
        if self._live:
            with suppress(OSError, ValueError):
                self._live.stop()
        self._live, self.on_terminal = None, False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Print a line, above the live area if there is one."""
        with suppress(OSError, ValueError):
            if self._live:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self._stream, flush=True)

    def due(self, *, every: float = EVERY, now: bool = False) -> bool:
        """Whether the next plain line of progress is due: EVERY seconds after the last one, or `now`."""
        moment = time.monotonic()
        if self.on_terminal or not (now or moment - self._shown >= every):
            return False
        self._shown = moment
        return True


class Progress:
    """Counts finished pieces of work, such as layers: a bar on a terminal, a line every EVERY seconds elsewhere."""

    def __init__(self, total: int, *, label: str, unit: str, stream: TextIO | None = None) -> None:
        """`stream`: standard error if absent."""
        self._total, self._label, self._unit = total, label, unit
        self._done, self._text, self._began = 0, "", time.monotonic()
        self._display = Display(self._draw, stream=stream or sys.stderr)

    def __enter__(self) -> Self:
        self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()

    def advance(self, text: str = "") -> None:
        """One more piece is done; `text` says how it went."""
        self._done, self._text = self._done + 1, text
        if self._display.due(now=self._done == self._total):
            self._display.say(f"{self._label}: {self._line()}")

    def _line(self) -> str:
        left = time_left(self._began, done=self._done, total=self._total)
        parts = [f"{self._unit} {self._done}/{self._total}", self._text, left and f"{left} left"]
        return ", ".join(filter(None, parts))

    def _draw(self) -> Text:
        from rich.text import Text

        return Text.assemble(f"{self._label} ", bar(self._done, self._total), f" {self._line()}", **ONE_LINE)


ONE_LINE: dict[str, Any] = {"no_wrap": True, "overflow": "ellipsis"}
"""What rich needs to cut a line at the terminal's edge."""


def bar(done: int, total: int) -> tuple[str, str]:
    """A bar of 24 characters and its style, a part of a rich Text."""
    filled = _BAR * done // max(1, total)
    return "█" * filled + "░" * (_BAR - filled), "cyan"


def clock(seconds: float) -> str:
    """Seconds as 0:07 or 1:02:03."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def time_left(began: float, *, done: int, total: int) -> str:
    """How long the rest takes at the speed since `began` (time.monotonic), as a clock; "" before the first and after
    the last."""
    return clock((time.monotonic() - began) / done * (total - done)) if 0 < done < total else ""
