"""What a person sees of a run: one live display on a terminal, plain lines elsewhere.

`stages.py` reports events here. Without a display, as under a Prefect worker, they go nowhere: Prefect's log has all.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tasks.display import Display

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["waiting", "running", "done", "cached", "failed"]

_MARKS: dict[State, str] = {
    "waiting": "[dim]·[/]",
    "running": "[cyan]▶[/]",
    "done": "[green]✔[/]",
    "cached": "[green]≡[/]",
    "failed": "[red]✘[/]",
}
_open: list[StageDisplay] = []


def state(stage: str, new: State) -> None:
    """Report that a stage is now waiting, running, done, cached or failed."""
    for display in _open:
        display.state(stage, new)


def line(stage: str, text: str) -> None:
    """Report a line that a stage's command printed."""
    for display in _open:
        display.line(stage, text)


@contextmanager
def display(*, terminal: bool | None = None) -> Iterator[None]:
    """Show the events reported inside the block: live if standard output is a terminal, else as lines."""
    shown = StageDisplay(terminal=terminal)
    _open.append(shown)
    try:
        with shown.area:
            yield
    finally:
        _open.remove(shown)


@dataclass
class Row:
    """A stage on the display."""

    state: State = "waiting"
    started: float | None = None
    seconds: float = 0.0
    text: str = ""

    def move(self, new: State) -> None:
        """Change the state, and keep the time."""
        now = time.monotonic()
        if new == "running" and self.started is None:
            self.started = now
        if new in ("done", "failed") and self.started is not None:
            self.seconds, self.started = now - self.started, None
        self.state = new

    @property
    def clock(self) -> str:
        seconds = self.seconds if self.started is None else time.monotonic() - self.started
        return f"{seconds:.0f} s" if seconds else ""


class StageDisplay:
    """A table of the stages (state, seconds, last line), or lines `stage | text`."""

    def __init__(self, *, terminal: bool | None = None) -> None:
        self.rows: dict[str, Row] = {}
        self.area = Display(self.table, stream=sys.stdout, terminal=terminal)
        self._lock = threading.Lock()

    def state(self, stage: str, new: State) -> None:
        with self._lock:
            row = self.rows.setdefault(stage, Row())
            row.move(new)
            if not self.area.on_terminal and new != "waiting":
                self.area.say(f"{stage} | == {new} {row.clock if row.seconds else ''}".rstrip())

    def line(self, stage: str, text: str) -> None:
        with self._lock:
            if not self.area.on_terminal:
                self.area.say(f"{stage} | {text}")
            elif text.strip():
                self.rows.setdefault(stage, Row()).text = text.strip()

    def table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        table.add_column()
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True, min_width=6)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for name, row in list(self.rows.items()):
            text = row.text if row.state in ("running", "failed") else ""
            table.add_row(_MARKS[row.state], name, row.state, row.clock, Text(text, style="dim"))
        return table
