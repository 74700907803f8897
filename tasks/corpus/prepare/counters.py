"""What units at work count: the small file that each leaves in a shared folder, and the sums over them."""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from tasks.corpus.files import TMP

NOT_DROPS = ("read", "kept")
WRITE = 1.0  # seconds between two writes of a meter


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


@dataclass
class Sums:
    """The counters of a domain's units in one phase; `fresh` are this run's bytes, between `began` and `until`."""

    files: int = 0
    documents: int = 0
    tokens: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    fresh: int = 0
    began: float | None = None
    until: float = 0.0

    def add(self, unit: Snapshot, *, sign: int) -> None:
        """Add a unit's counters, or take them away."""
        self.files += sign * unit.files
        self.documents += sign * unit.documents
        self.tokens += sign * unit.tokens
        for rule, n in unit.rules.items():
            self.rules[rule] += sign * n


class Counters:
    """Sums over a folder's meters. A file that vanishes keeps what it last said; an unreadable one is passed over."""

    def __init__(self, folder: Path, now: float) -> None:
        self.sums: dict[tuple[str, str], Sums] = {}
        """{(domain, phase): sums}"""
        self._folder = folder
        self._units: dict[str, Snapshot] = {}
        self._read: dict[str, tuple[int, int, int]] = {}
        self._looked: float | None = None  # when; what the first look finds is an earlier run's work
        self.poll(now)

    def poll(self, now: float) -> None:
        """Read the files that changed; `now` in seconds."""
        for name, unit in self._changed():
            sums = self.sums.setdefault((unit.domain, unit.phase), Sums())
            before = self._units.get(name)
            if before:
                sums.add(before, sign=-1)
            sums.add(unit, sign=1)
            self._units[name] = unit
            if before and before.attempt != unit.attempt:
                before = None
            if self._looked is not None:
                sums.finished += unit.done and not (before and before.done)
                if grown := unit.bytes - (before.bytes if before else 0):
                    sums.fresh += grown
                    sums.began = self._looked if sums.began is None else sums.began
                    sums.until = now
        self._looked = now

    def finished(self, phase: str) -> int:
        """Units of a phase that were finished since the first look."""
        return sum(sums.finished for (_, of), sums in self.sums.items() if of == phase)

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

    def _changed(self) -> Iterator[tuple[str, Snapshot]]:
        try:
            entries = sorted(os.scandir(self._folder), key=lambda entry: entry.name)
        except OSError:  # not there yet, or not now
            return
        for entry in entries:
            if not entry.name.endswith(".json"):
                continue
            with suppress(OSError, ValueError):  # vanished or half-written: the next look may find it whole
                status = entry.stat()
                signature = (status.st_ino, status.st_mtime_ns, status.st_size)
                if self._read.get(entry.name) != signature:
                    unit = Snapshot.model_validate_json(Path(entry.path).read_bytes())
                    self._read[entry.name] = signature
                    yield entry.name, unit
