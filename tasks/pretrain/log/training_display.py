"""What a person sees of a run: a live display on a terminal, plain lines elsewhere. It reads the log's records."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.live import Live

_REFRESHES = 2  # a second
_BAR = 24


class TrainingDisplay:
    """Shows the records that the log gets.

    On a terminal: a bar with step, loss, learning rate, tokens/s, MFU and the time left, the domains in a table, and
    the load of the experts; events and what is said stand above. Elsewhere: the first step, the last, and a line every
    `every` seconds between them.
    """

    def __init__(self, steps: int, *, every: float = 10.0) -> None:
        from rich.console import Console

        self._steps, self._every = steps, every
        self._begun = self._shown = 0.0
        self._done = 0
        self._step: dict[str, Any] = {}
        self._validation: dict[str, Any] = {}
        console = Console()
        on_terminal = sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal
        self._console = console if on_terminal else None
        self._live: Live | None = None

    def show(self, record: dict[str, Any]) -> None:
        """Show a record of the log: `step`, `validation` or `event`."""
        if record["kind"] == "event":
            self.say(f"step {record['step']}: {record['message']}")
        elif record["kind"] == "validation":
            self._validation = record
            losses = "  ".join(f"{domain} {loss:.4f}" for domain, loss in record["losses"].items())
            self.say(f"validation at step {record['step']}: mean {record['mean']:.4f}  {losses}")
        else:
            now, step = time.perf_counter(), record["step"]
            if not self._done:
                self._begun = now - record["timing"]["seconds"]
            self._step = record
            self._done += 1
            due = self._done == 1 or step == self._steps or now - self._shown >= self._every
            if self._console:
                self._start()
            elif due:
                self._shown = now
                print(self._line(), flush=True)

    def say(self, text: str) -> None:
        """Print a line above the live display."""
        if self._console:
            self._start()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Stop, and leave the last state on the terminal; may be called twice."""
        if self._live:
            self._live.stop()
            self._live = self._console = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        from rich.live import Live

        if self._live or not self._console:
            return
        # A thread draws, at a rate of its own: a step only leaves its record.
        self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=_REFRESHES)
        self._live.start()
        self._console.show_cursor(True)  # rich hides it, and kill -9 would leave it so

    def _line(self) -> str:
        """The last step in words."""
        record = self._step
        if not record:
            return f"step 0/{self._steps}"
        timing, step = record["timing"], record["step"]
        left = (time.perf_counter() - self._begun) / self._done * (self._steps - step)
        mfu = f"  MFU {timing['mfu']:.0%}" if "mfu" in timing else ""
        return (
            f"step {step}/{self._steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{timing['tokens_per_second']:.0f} tokens/s{mfu}  {clock(left)} left"
        )

    def _draw(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        one_line: dict[str, Any] = {"no_wrap": True, "overflow": "ellipsis"}
        parts: list[RenderableType] = []
        if self._validation or self._step:
            parts.append(self._table())
        if load := self._step.get("experts"):
            busiest = f"busiest {load['peak']:.1%}, {load['dead']} without tokens"
            parts.append(Text(f"experts: entropy {load['entropy']:.3f} of 1, {busiest}", **one_line))
        filled = _BAR * self._step["step"] // self._steps if self._step else 0
        bar = ("█" * filled + "░" * (_BAR - filled), "cyan")
        parts.append(Text.assemble(bar, " ", self._line(), **one_line))
        return Group(*parts)

    def _table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("domain")
        for title in ("weight", "loss", "validation", "epochs"):
            table.add_column(title, justify="right")
        steps, losses = self._step.get("domains", {}), self._validation.get("losses", {})
        weights = self._validation.get("weights", {})
        for domain in losses or steps:
            step = steps.get(domain, {})
            cells = ((weights.get(domain), 3), (step.get("loss"), 4), (losses.get(domain), 4), (step.get("epochs"), 3))
            table.add_row(Text(domain), *("–" if value is None else f"{value:.{digits}f}" for value, digits in cells))
        return table


def clock(seconds: float) -> str:
    """Seconds as 0:07 or 1:02:03."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
