"""Counters that units at work leave in a shared folder, and one display of them: live on a terminal, else lines."""

from __future__ import annotations

import glob
import os
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from tasks.corpus.files import TMP

WRITE = 1.0  # seconds between two writes of a meter
POLL = 1.0  # seconds between two looks at the folder
EVERY = 10.0  # seconds between plain lines
SHOWN = 3  # rules named per domain
NOT_DROPS = ("read", "kept")


class Snapshot(BaseModel):
    """What a unit has counted so far. `attempt` tells a unit that is run again from the run before."""

    model_config = ConfigDict(extra="forbid")

    phase: str
    domain: str
    task: int
    attempt: str
    done: bool = False
    files: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    rules: Counter[str] = Counter()


class Meter:
    """The counters of one unit of work, written to `folder` about once a second, for a Display on any machine.

    Its file stays when the unit is finished, so that a later run shows what earlier ones did.
    """

    def __init__(self, folder: Path, *, phase: str, domain: str, task: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{phase}-{domain}-{task:05}.json"
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

    def _write(self) -> None:
        self._written = time.monotonic()
        self._now.rules = self.rules
        staging = self._path.with_name(f".{self._path.name}{TMP}{uuid.uuid4().hex}")
        with suppress(OSError):  # a full disk stops the work by the work's own writes, not by its meter
            staging.write_text(self._now.model_dump_json())
            os.replace(staging, self._path)


@dataclass
class Sums:
    """The counters of a domain's units in one phase; `fresh` are this run's bytes, between `began` and `until`."""

    files: int = 0
    documents: int = 0
    tokens: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    done: int = 0
    fresh: int = 0
    began: float | None = None
    until: float = 0.0

    def add(self, unit: Snapshot, *, before: int) -> None:
        """Add a unit, of whose bytes `before` are of an earlier run."""
        self.files += unit.files
        self.documents += unit.documents
        self.tokens += unit.tokens
        self.rules.update(unit.rules)
        self.done += unit.done
        self.fresh += unit.bytes - before


class Tally:
    """Sums over a folder's meters. A file that vanishes keeps what it last said; an unreadable one is passed over."""

    def __init__(self, folder: Path, now: float) -> None:
        self._folder = folder
        self._finished: dict[tuple[str, str], Sums] = defaultdict(Sums)
        self._closed: set[str] = set()  # finished units, whose files need no second look
        self._open: dict[str, Snapshot] = {}
        self._before: dict[str, int] = {}
        self._looked = now
        self.sums: dict[tuple[str, str], Sums] = {}
        """{(domain, phase): sums}"""
        self._read()
        self._before = {unit.attempt: unit.bytes for unit in self._open.values()}
        for sums in self._finished.values():
            sums.fresh = 0
        self.poll(now)

    def poll(self, now: float) -> None:
        """Read the folder again; `now` in seconds."""
        self._read()
        found: dict[tuple[str, str], Sums] = defaultdict(Sums)
        for key, sums in self._finished.items():
            found[key] = Sums(**{**vars(sums), "rules": Counter(sums.rules)})
        for unit in self._open.values():
            found[unit.domain, unit.phase].add(unit, before=self._before.get(unit.attempt, 0))
        for key, sums in found.items():
            last = self.sums.get(key, Sums())
            sums.began, sums.until = last.began, last.until
            if sums.fresh > last.fresh:
                sums.began = self._looked if sums.began is None else sums.began
                sums.until = now
        self.sums, self._looked = found, now

    def done(self, phase: str) -> int:
        """Finished units of a phase."""
        return sum(sums.done for (_, of), sums in self.sums.items() if of == phase)

    def largest(self, domain: str, counter: str) -> int:
        """A counter of the phase in which it is largest: phases see the same documents one after the other."""
        return max((getattr(sums, counter) for sums in self._of(domain)), default=0)

    def dropped(self, domain: str) -> Counter[str]:
        """Records dropped by each rule in any phase."""
        total: Counter[str] = Counter()
        for sums in self._of(domain):
            total.update({rule: n for rule, n in sums.rules.items() if n and rule not in NOT_DROPS})
        return total

    def rate(self, domain: str, phase: str | None = None) -> float | None:
        """Input bytes per second of this run, in one phase or over all; None before there is a figure."""
        chosen = self._of(domain, phase)
        seconds = sum(sums.until - sums.began for sums in chosen if sums.began is not None)
        return max(sums.fresh for sums in chosen) / seconds if seconds > 0 else None

    def _of(self, domain: str, phase: str | None = None) -> list[Sums]:
        return [sums for (name, of), sums in self.sums.items() if name == domain and phase in (None, of)]

    def _read(self) -> None:
        for name in sorted(set(glob.glob("*.json", root_dir=self._folder)) - self._closed):
            try:
                unit = Snapshot.model_validate_json((self._folder / name).read_bytes())
            except (OSError, ValueError):  # vanished or half-written: the next look may find it whole
                continue
            if unit.done:
                self._open.pop(name, None)
                self._closed.add(name)
                self._finished[unit.domain, unit.phase].add(unit, before=self._before.get(unit.attempt, 0))
            else:
                self._open[name] = unit


class Display:
    """Shows the meters of a folder on stderr while it is open; a context manager. Never the cause of a run's end."""

    def __init__(self, folder: Path, *, domains: list[str]) -> None:
        self._domains = domains
        self.tally = Tally(folder, time.monotonic())
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="corpus display", daemon=True)
        self._phase, self._units, self._done_before, self._began = "", 0, 0, time.monotonic()
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
        self.tally.poll(time.monotonic())
        if self._live:
            with suppress(OSError, ValueError):
                self._live.stop()
        for domain in self._started():
            self.say(self._line(domain, None))

    def phase(self, name: str, units: int) -> None:
        """A phase begins, of so many units, those that an earlier run finished among them."""
        with self._lock:
            self.tally.poll(time.monotonic())
            self._phase, self._units, self._began = name, units, time.monotonic()
            self._done_before = self.tally.done(name)
            if self._live:
                self._refresh()
            else:
                before = f", {self._done_before:,} of them done before" if self._done_before else ""
                self.say(f"{name}: {units:,} units{before}")

    def look(self) -> None:
        """Read the meters and show them; the display's thread does it once a second."""
        with self._lock:
            self.tally.poll(time.monotonic())
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
        done, eta = self.tally.done(self._phase), self._eta()
        self.say(f"{self._phase}: {done:,} of {self._units:,} units{f', {eta} to go' if eta else ''}")
        for domain in self._started():
            if (line := self._line(domain, self._phase)) != self._lines.get(domain):
                self._lines[domain] = line
                self.say(f"  {line}")

    def _started(self) -> list[str]:
        return [domain for domain in self._domains if any(name == domain for name, _ in self.tally.sums)]

    def _line(self, domain: str, phase: str | None) -> str:
        files, documents, tokens, rate, dropped = self._cells(domain, phase)
        text = f"{domain}: {files} files, {documents} documents, {tokens} tokens"
        return text + (f", {rate} MB/s" if rate else "") + (f"; dropped {dropped}" if dropped else "")

    def _cells(self, domain: str, phase: str | None) -> list[str]:
        rate, records = self.tally.rate(domain, phase), self.tally.largest(domain, "documents")
        worst = self.tally.dropped(domain).most_common(SHOWN) if records else []
        return [
            *(f"{self.tally.largest(domain, counter):,}" for counter in ("files", "documents", "tokens")),
            "" if rate is None else f"{rate / 1e6:.1f}",
            ", ".join(f"{rule} {count / records:.1%}" for rule, count in worst),
        ]

    def _eta(self) -> str:
        """Time left by the units that this run finished; "" before the first."""
        done = self.tally.done(self._phase)
        fresh = done - self._done_before
        if fresh <= 0 or done >= self._units:
            return ""
        left = round((time.monotonic() - self._began) / fresh * (self._units - done))
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"

    def _refresh(self) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table("domain", box=None, pad_edge=False)
        for title in ("files", "documents", "tokens", "MB/s"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("dropped", no_wrap=True, overflow="ellipsis", ratio=1)
        for domain in self._domains:
            table.add_row(domain, *self._cells(domain, self._phase))
        done = self.tally.done(self._phase)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(self._phase),
            ProgressBar(total=max(1, self._units), completed=done, width=30),
            Text(f"{done:,}/{self._units:,} units  ETA {self._eta() or '–'}"),
        )
        with suppress(OSError, ValueError):
            self._live.update(Group(table, bar), refresh=True)
