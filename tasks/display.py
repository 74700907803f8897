"""One display for everything that takes long: rich's progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column

EVERY = 10.0
"""Seconds between plain lines of progress."""


def text_column(template: str) -> TextColumn:
    """A column without markup, cut at the terminal's edge."""
    return TextColumn(template, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))


class Display:
    """Live bars at the end of a terminal, and lines above them; without a terminal, the lines alone.

    It never ends a run: a line that the stream cannot take, because it is closed or cannot spell it, is lost.
    """

    def __init__(self, *columns: ProgressColumn, stream: TextIO, terminal: bool | None = None) -> None:
        """
        Args:
            columns: of the table of bars.
            stream: sys.stdout or sys.stderr.
            terminal: whether the stream is one, if the display should not ask it.
        """
        dumb = os.environ.get("TERM", "").lower() in {"dumb", "unknown"}
        self.stream = stream
        self.on_terminal = stream.isatty() and not dumb if terminal is None else terminal
        self.bars = Bars(
            *columns,
            console=Console(file=stream),
            refresh_per_second=2,
            speed_estimate_period=3600,
            redirect_stdout=stream is sys.stdout,  # a display on stderr leaves stdout alone: it may be a pipe
            get_time=lambda: time.monotonic(),
            disable=not self.on_terminal,
            expand=True,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        if self.on_terminal:
            self.bars.console.show_cursor(True)  # rich hides it, and kill -9 would leave it so
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state on the terminal. What is said from here on are plain lines."""
        with suppress(OSError, ValueError):
            self.bars.stop()
        self.on_terminal = False

    def say(self, text: str) -> None:
        """Print a line, above the bars if there are any."""
        with suppress(OSError, ValueError):
            if self.on_terminal:
                self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self.stream, flush=True)


class Progress(Display):
    """Counts finished pieces of work, such as layers: a bar on a terminal, a line every EVERY seconds elsewhere."""

    def __init__(self, total: int, *, label: str, unit: str, done: int = 0, stream: TextIO | None = None) -> None:
        """
        Args:
            done: pieces that an earlier run finished.
            stream: standard error if absent.
        """
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            text_column("{task.fields[text]}"),
            TimeRemainingColumn(),
            stream=stream or sys.stderr,
        )
        self._label = f"{label}: {unit}" if label else unit
        self._id = self.bars.add_task(self._label, total=total, completed=done, text="")
        self._task = self.bars.tasks[0]
        self._printed = time.monotonic() - EVERY  # the first piece gets a line

    def advance(self, text: str = "", *, by: int = 1) -> None:
        """`by` more pieces are done; `text` says how it went."""
        self.reach(int(self._task.completed) + by, text)

    def begin(self, done: int) -> None:
        """Go on after `done` pieces."""
        self.bars.reset(self._id, completed=done, text="")

    def reach(self, done: int, text: str = "") -> None:
        """`done` pieces are done in all."""
        self.bars.update(self._id, completed=done, text=text)
        now = time.monotonic()
        if not self.on_terminal and (self._task.finished or now - self._printed >= EVERY):
            self._printed = now
            left = self._task.time_remaining
            parts = [
                f"{self._label} {self._task.completed:.0f}/{self._task.total:.0f}",
                text,
                f"{timedelta(seconds=left)} left" if left else "",
            ]
            self.say(", ".join(filter(None, parts)))
