"""Shows the counters that units at work leave in a folder: a table of the domains, and the units of the phase."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tasks.corpus.prepare.counters import Counters
from tasks.display import ONE_LINE, Display, bar, time_left

if TYPE_CHECKING:
    from rich.console import Group

POLL = 1.0  # seconds between two looks at the folder
SHOWN = 3  # rules named per domain


class CorpusDisplay:
    """Shows the counters of a folder on stderr while it is open; a context manager. It never ends a run."""

    def __init__(self, folder: Path, *, domains: list[str]) -> None:
        self._domains = domains
        self.counters = Counters(folder, time.monotonic())
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="corpus display", daemon=True)
        self._phase, self._units, self._before, self._start, self._began = "", 0, 0, 0, time.monotonic()
        self._lines: dict[str, str] = {}
        self._display = Display(lambda: self._drawn, stream=sys.stderr, transient=True)
        if self._display.on_terminal:
            self._drawn = self._draw()

    def __enter__(self) -> Self:
        self._display.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.counters.poll(time.monotonic())
        self._display.close()
        for domain in self._started():
            self.say(self._line(domain, None))

    def phase(self, name: str, units: int, *, before: int = 0) -> None:
        """A phase of `units` units begins, `before` of which an earlier run finished."""
        with self._lock:
            self.counters.poll(time.monotonic())
            self._phase, self._units, self._before, self._began = name, units, before, time.monotonic()
            self._start = self.counters.finished(name)
            if self._display.on_terminal:
                self._drawn = self._draw()
            else:
                self.say(f"{name}: {units:,} units{f', {before:,} of them done before' if before else ''}")

    def look(self) -> None:
        """Read the counters and show them; the display's thread does it once a second."""
        with self._lock:
            self.counters.poll(time.monotonic())
            if self._display.on_terminal:
                self._drawn = self._draw()
            elif self._phase and self._display.due():
                self._print()

    def say(self, text: str) -> None:
        """Print a line above the display."""
        self._display.say(text)

    def _watch(self) -> None:
        while not self._stop.wait(POLL):
            self.look()

    def _print(self) -> None:
        """Where the phase is, and the domains in which something changed since the last time."""
        done, left = self._done()
        self.say(f"{self._phase}: {done:,} of {self._units:,} units{f', {left} left' if left else ''}")
        for domain in self._started():
            if (line := self._line(domain, self._phase)) != self._lines.get(domain):
                self._lines[domain] = line
                self.say(f"  {line}")

    def _started(self) -> list[str]:
        largest = self.counters.largest
        return [domain for domain in self._domains if largest(domain, "files") or largest(domain, "documents")]

    def _line(self, domain: str, phase: str | None) -> str:
        files, documents, tokens, rate, dropped = self._cells(domain, phase)
        text = f"{domain}: {files} files, {documents} documents, {tokens} tokens"
        return text + (f", {rate} MB/s" if rate else "") + (f"; dropped {dropped}" if dropped else "")

    def _cells(self, domain: str, phase: str | None) -> list[str]:
        rate, records = self.counters.rate(domain, phase), self.counters.largest(domain, "documents")
        worst = self.counters.dropped(domain).most_common(SHOWN) if records else []
        return [
            *(f"{self.counters.largest(domain, counter):,}" for counter in ("files", "documents", "tokens")),
            "" if rate is None else f"{rate / 1e6:.1f}",
            ", ".join(f"{rule} {count / records:.1%}" for rule, count in worst),
        ]

    def _done(self) -> tuple[int, str]:
        """Finished units of the phase, and the time left at the speed of this run."""
        fresh = self.counters.finished(self._phase) - self._start
        left = time_left(self._began, done=fresh, total=self._units - self._before)
        return self._before + fresh, left

    def _draw(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, expand=True)  # else long rules push the other columns out
        table.add_column("domain", no_wrap=True)
        for title in ("files", "documents", "tokens", "MB/s"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("dropped", no_wrap=True, overflow="ellipsis", ratio=1)
        for domain in self._domains:
            table.add_row(domain, *self._cells(domain, self._phase))
        done, left = self._done()
        units = f" {self._phase} {done:,}/{self._units:,} units  {left or '–'} left"
        return Group(table, Text.assemble(bar(done, self._units), units, **ONE_LINE))
