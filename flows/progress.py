"""What a person sees of a run: one live display on a terminal, plain lines elsewhere.

`stages.py` reports events here. Without a listener, as under a Prefect worker, they go nowhere: Prefect's log has all.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["waiting", "running", "done", "cached", "failed"]


class Listener(Protocol):
    """Hears of every change of a stage's state and of every line that it prints."""

    def state(self, stage: str, state: State, /) -> None: ...

    def line(self, stage: str, text: str, /) -> None: ...


_listeners: list[Listener] = []


def state(stage: str, new: State) -> None:
    """Report that a stage is now waiting, running, done, cached or failed."""
    for listener in _listeners:
        listener.state(stage, new)


def line(stage: str, text: str) -> None:
    """Report a line that a stage's command printed."""
    for listener in _listeners:
        listener.line(stage, text)


@contextmanager
def display(*, terminal: bool | None = None) -> Iterator[None]:
    """Show the events reported inside the block: live if standard output is a terminal, else as lines."""
    listener = Live() if (sys.stdout.isatty() if terminal is None else terminal) else Plain()
    _listeners.append(listener)
    try:
        with listener:
            yield
    finally:
        _listeners.remove(listener)


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


@dataclass
class Plain:
    """Lines `stage | text`."""

    rows: dict[str, Row] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def state(self, stage: str, new: State, /) -> None:
        with self.lock:
            row = self.rows.setdefault(stage, Row())
            row.move(new)
            if new != "waiting":
                print(f"{stage} | == {new} {row.clock if row.seconds else ''}".rstrip(), flush=True)

    def line(self, stage: str, text: str, /) -> None:
        with self.lock:
            print(f"{stage} | {text}", flush=True)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


MARKS: dict[State, str] = {
    "waiting": "[dim]·[/]",
    "running": "[cyan]▶[/]",
    "done": "[green]✔[/]",
    "cached": "[green]≡[/]",
    "failed": "[red]✘[/]",
}


class Live:
    """A table of the stages, redrawn in place: state, seconds, last line."""

    def __init__(self) -> None:
        from rich.live import Live as RichLive

        self.rows: dict[str, Row] = {}
        self.live = RichLive(get_renderable=self._table, refresh_per_second=4)

    def state(self, stage: str, new: State, /) -> None:
        self.rows.setdefault(stage, Row()).move(new)

    def line(self, stage: str, text: str, /) -> None:
        if text.strip():
            self.rows.setdefault(stage, Row()).text = text.strip()

    def _table(self) -> Table:
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
            table.add_row(MARKS[row.state], name, row.state, row.clock, Text(text, style="dim"))
        return table

    def __enter__(self) -> None:
        self.live.__enter__()

    def __exit__(self, *error: object) -> None:
        self.live.__exit__(*error)  # type: ignore[arg-type]
