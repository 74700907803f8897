"""Shows a run: step, loss, speed and time left, the domains, and the load of the experts."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

from tasks.display import EVERY, ONE_LINE, Display, bar, clock

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


class TrainingDisplay:
    """Shows the records of the log.

    On a terminal: a bar with step, loss, learning rate, tokens/s, MFU and the time left, the domains in a table, and
    the load of the experts; events stand above. Elsewhere: the first step, the last, and one every `every` seconds.
    """

    def __init__(self, steps: int, *, every: float = EVERY) -> None:
        self._steps, self._every = steps, every
        self._begun = 0.0
        self._done = 0
        self._step: dict[str, Any] = {}
        self._validation: dict[str, Any] = {}
        self._display = Display(self._draw, stream=sys.stdout)

    def show(self, record: dict[str, Any]) -> None:
        """Show a record of the log: `step`, `validation` or `event`."""
        if record["kind"] == "event":
            self.say(f"step {record['step']}: {record['message']}")
        elif record["kind"] == "validation":
            self._validation = record
            losses = "  ".join(f"{domain} {loss:.4f}" for domain, loss in record["losses"].items())
            self.say(f"validation at step {record['step']}: mean {record['mean']:.4f}  {losses}")
        else:
            if not self._done:
                self._begun = time.monotonic() - record["timing"]["seconds"]
            self._step = record
            self._done += 1
            self._display.start()
            if self._display.due(every=self._every, now=self._done == 1 or record["step"] == self._steps):
                self.say(self._line())

    def say(self, text: str) -> None:
        """Print a line above the live display."""
        self._display.start()
        self._display.say(text)

    def close(self) -> None:
        """Stop, and leave the last state on the terminal; may be called twice."""
        self._display.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self) -> str:
        """The last step in words."""
        record = self._step
        if not record:
            return f"step 0/{self._steps}"
        timing, step = record["timing"], record["step"]
        left = (time.monotonic() - self._begun) / self._done * (self._steps - step)
        mfu = f"  MFU {timing['mfu']:.0%}" if "mfu" in timing else ""
        return (
            f"step {step}/{self._steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{timing['tokens_per_second']:.0f} tokens/s{mfu}  {clock(left)} left"
        )

    def _draw(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = []
        if self._validation or self._step:
            parts.append(self._table())
        if load := self._step.get("experts"):
            busiest = f"busiest {load['peak']:.1%}, {load['dead']} without tokens"
            parts.append(Text(f"experts: entropy {load['entropy']:.3f} of 1, {busiest}", **ONE_LINE))
        parts.append(Text.assemble(bar(self._step.get("step", 0), self._steps), " ", self._line(), **ONE_LINE))
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
