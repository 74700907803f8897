"""What a person sees of a run: a live display on a terminal, plain lines elsewhere. It reads the log's records."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self


class Display:
    """Shows the records that the log gets.

    On a terminal: a bar with step, loss, learning rate, tokens/s, MFU and the time left, the domains in a table, and
    the load of the experts; what is said stands above. Elsewhere: the first step, the last, and one line every
    `every` seconds.
    """

    def __init__(self, steps: int, *, every: float = 10.0) -> None: ...

    def show(self, record: dict[str, Any]) -> None:
        """Show a record of the log: `step`, `heldout` or `event`."""

    def say(self, text: str) -> None:
        """Print a line above the live display."""

    def close(self) -> None:
        """Stop, and leave the last state on the terminal; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
