"""Counters that units at work leave in a shared folder, and one display of them: live on a terminal, else lines."""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tasks.corpus.build.counters import Counters, Snapshot
from tasks.corpus.files import TMP

WRITE = 1.0  # seconds between two writes of a meter
POLL = 1.0  # seconds between two looks at the folder
EVERY = 10.0  # seconds between plain lines
SHOWN = 3  # rules named per domain


class Meter:
    """The counters of one unit of work, written to `folder` about once a second, for a Display on any machine.

    A context manager, closed by a block that ends without an error. Its file stays, so that a later run shows what
    earlier ones did.
    """

    def __init__(self, folder: Path, *, phase: str, domain: str, task: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = _path(folder, phase=phase, domain=domain, task=task)
        self._now = Snapshot(phase=phase, domain=domain, task=task, attempt=uuid.uuid4().hex)
        self.rules: Counter[str] = Counter()
        """Records dropped, by rule; each record in one phase only."""
        self._write()

    def add(self, files: int = 0, *, documents: int = 0, tokens: int = 0, bytes: int = 0) -> None:
        """Count input files and bytes read, records looked at (whatever becomes of them), and tokens written."""
        now = self._now
        now.files += files
        now.documents += documents
        now.tokens += tokens
        now.bytes += bytes
        if time.monotonic() - self._written >= WRITE:
            self._write()

    def close(self) -> None:
        """The unit is finished; one that failed stays open."""
        self._now.done = True
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def _write(self) -> None:
        self._written = time.monotonic()
        self._now.rules = self.rules
        staging = self._path.with_name(f".{self._path.name}{TMP}{uuid.uuid4().hex}")
        with suppress(OSError):  # a full disk stops the work by the work's own writes, not by its meter
            staging.write_text(self._now.model_dump_json())
            os.replace(staging, self._path)


def forget(folder: Path, *, phase: str, domain: str, task: int) -> None:
    """Delete the counters of a unit that is to be run anew."""
    _path(folder, phase=phase, domain=domain, task=task).unlink(missing_ok=True)


def _path(folder: Path, *, phase: str, domain: str, task: int) -> Path:
    return folder / f"{phase}-{domain}-{task:05}.json"


class Display:
    """Shows the meters of a folder on stderr while it is open; a context manager. Never the cause of a run's end."""

    def __init__(self, folder: Path, *, domains: list[str]) -> None:
        self._domains = domains
        self.counters = Counters(folder, time.monotonic())
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="corpus display", daemon=True)
        self._phase, self._units, self._before, self._start, self._began = "", 0, 0, 0, time.monotonic()
        self._printed = time.monotonic()
        self._lines: dict[str, str] = {}
        self._live: Any = None
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.live import Live

            # stdout is left alone: it may be a file or a pipe, and rich would send it to the terminal.
            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=False)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.counters.poll(time.monotonic())
        if self._live:
            with suppress(OSError, ValueError):
                self._live.stop()
        for domain in self._started():
            self.say(self._line(domain, None))

    def phase(self, name: str, units: int, *, before: int = 0) -> None:
        """A phase of `units` units begins, `before` of which an earlier run finished."""
        with self._lock:
            self.counters.poll(time.monotonic())
            self._phase, self._units, self._before, self._began = name, units, before, time.monotonic()
            self._start = self.counters.finished(name)
            if self._live:
                self._refresh()
            else:
                self.say(f"{name}: {units:,} units{f', {before:,} of them done before' if before else ''}")

    def look(self) -> None:
        """Read the meters and show them; the display's thread does it once a second."""
        with self._lock:
            self.counters.poll(time.monotonic())
            if self._live:
                self._refresh()
            elif self._phase and time.monotonic() - self._printed >= EVERY:
                self._printed = time.monotonic()
                self._print()

    def say(self, text: str) -> None:
        """Print a line above the display."""
        with suppress(OSError, ValueError):  # stderr is closed or cannot spell it
            if self._live:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._stop.wait(POLL):
            self.look()

    def _print(self) -> None:
        """Where the phase is, and the domains in which something changed since the last time."""
        done, eta = self._done()
        self.say(f"{self._phase}: {done:,} of {self._units:,} units{f', {eta} to go' if eta else ''}")
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
        """Finished units of the phase, and the time left by those that this run finished; "" before the first."""
        fresh = self.counters.finished(self._phase) - self._start
        done = self._before + fresh
        if not fresh or done >= self._units:
            return done, ""
        left = round((time.monotonic() - self._began) / fresh * (self._units - done))
        return done, f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"

    def _refresh(self) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, expand=True)  # else long rules push the other columns out
        table.add_column("domain", no_wrap=True)
        for title in ("files", "documents", "tokens", "MB/s"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("dropped", no_wrap=True, overflow="ellipsis", ratio=1)
        for domain in self._domains:
            table.add_row(domain, *self._cells(domain, self._phase))
        done, eta = self._done()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(self._phase),
            ProgressBar(total=max(1, self._units), completed=done, width=30),
            Text(f"{done:,}/{self._units:,} units  ETA {eta or '–'}"),
        )
        with suppress(OSError, ValueError):
            self._live.update(Group(table, bar), refresh=True)
