"""What a person sees of a run: a table of stages on a terminal, plain lines `stage | text` elsewhere.

`stages.py` reports events here. Without a display, as under a Prefect worker, they go nowhere: Prefect's log has all.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from rich.progress import TaskID, TextColumn, TimeElapsedColumn

from tasks.display import Display, text_column

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
    with StageDisplay(terminal=terminal) as shown:
        _open.append(shown)
        try:
            yield
        finally:
            _open.remove(shown)


class StageDisplay(Display):
    """A row for each stage (state, time, last line), or lines."""

    def __init__(self, *, terminal: bool | None = None) -> None:
        columns = [TextColumn(f"{{task.fields[{name}]}}") for name in ("mark", "stage", "state")]
        super().__init__(
            *columns, TimeElapsedColumn(), text_column("{task.fields[text]}"), stream=sys.stdout, terminal=terminal
        )
        self._rows: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def state(self, stage: str, new: State) -> None:
        with self._lock:
            if stage not in self._rows:
                self._rows[stage] = self.bars.add_task(
                    "", start=False, total=None, mark="", stage=stage, state=new, text=""
                )
            row = self._rows[stage]
            if new == "running":
                self.bars.start_task(row)
            elif new != "waiting":
                self.bars.stop_task(row)
            self.bars.update(row, mark=_MARKS[new], state=new)
            if new == "done":
                self.bars.update(row, text="")
            seconds = self.bars.tasks[row].elapsed
            if not self.on_terminal and new != "waiting":
                took = f" {seconds:.0f} s" if new in ("done", "failed") and seconds else ""
                self.say(f"{stage} | == {new}{took}")

    def line(self, stage: str, text: str) -> None:
        if not self.on_terminal:
            self.say(f"{stage} | {text}")
        elif text.strip():
            self.bars.update(self._rows[stage], text=text.strip())
