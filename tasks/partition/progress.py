"""One live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

EVERY = 10.0  # seconds between plain lines


class Progress:
    """Counts finished layers; a context manager."""

    def __init__(self, layers: int, *, label: str) -> None:
        self._layers, self._label, self._done = layers, label, 0
        self._shown = time.monotonic()
        self._live: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Live

            self._live = Live(console=Console(stderr=True))
            self._task = self._live.add_task(label, total=layers)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def layer(self, text: str) -> None:
        """One more layer is done; `text` says how it went."""
        self._done += 1
        if self._live:
            self._live.update(self._task, advance=1, description=f"{self._label} {text}")
        elif self._done == self._layers or time.monotonic() - self._shown >= EVERY:
            self._shown = time.monotonic()
            print(f"{self._label}: layer {self._done}/{self._layers}: {text}", file=sys.stderr, flush=True)
