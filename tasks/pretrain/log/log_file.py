"""The log of a run: JSON lines, cut back to the checkpoint on resume, and the same numbers to trackers.

Records, by `kind`:

    step     step, tokens, predicted, loss (the cross-entropy alone), parts {balance, z, kl, hidden: those there are},
             total, grad_norm, lr, rates {part: lr} where they differ, domains {name: {loss, windows, epochs}}, experts
             (meters.expert_load), timing (meters.timing)
    validation  step, tokens, mean, losses {domain: nats per token}, weights, references, sampler, experts, timing
    event    step, what, message, and what belongs to it

A record's `timing` is the only part that differs between an interrupted and an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from tasks import scratch
from tasks.pretrain.job import TrainingError
from tasks.pretrain.log.trackers import Run, Tracker, start

Record = dict[str, Any]

LOG = "log.jsonl"

_HAS_NUMBERS = re.compile(rb'"kind": "(step|validation)".*\n')  # a whole line of log.jsonl
ROWS = 2000  # of a CSV file, which git keeps: log.jsonl has every record
_NOT_CURVES = {"kind", "step", "tokens", "sampler"}


class LogFile:
    """Appends records to log.jsonl, and their numbers to the trackers, as `step/loss` or `validation/losses/books`."""

    def __init__(
        self,
        run: Run,
        *,
        names: Sequence[str],
        offset: int,
        step: int,
        say: Callable[[str], None] = print,
    ) -> None:
        """Go on after `offset` bytes of run.folder/log.jsonl and after step `step`; what lies behind is dropped.

        Training does it again and writes the same numbers. Trackers that can't drop them get none of them twice.

        Args:
            names: of the trackers.
            say: tells a person that a tracker has failed; training goes on without it.

        Raises:
            TrainingError: the log is shorter than `offset`, or a tracker can't start.
        """
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / LOG
        path.touch()
        if path.stat().st_size < offset:
            raise TrainingError(
                f"{path} has {path.stat().st_size} bytes, but was {offset} long when the checkpoint was written; "
                f"delete {run.folder.parent} to start over"
            )
        self._told = run.folder / "told.json"
        try:
            told = scratch.read_sealed(self._told)
        except (FileNotFoundError, ValueError):
            told = {}
        known = told.get("trackers", [])
        self._repeated = self._count(path, offset, told=told.get("records", 0), trackers=known)
        os.truncate(path, offset)
        self._file = path.open("ab")
        self._hash = _digest(path)
        self._say = say
        new = [name for name in names if offset and name not in known]
        self._trackers = start([name for name in names if name not in new], run, step=step)
        self._new = start(new, run, step=0) if new else []
        self._trackers += self._new
        self._replay(path)
        self._names = sorted({*names, *known})
        scratch.write_sealed(self._told, {**scratch.read_sealed(self._told), "trackers": self._names})

    def write(self, record: Record) -> None:
        """Append a record."""
        line = json.dumps(_finite(record)).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._hash.update(line)
        if record["kind"] == "event":
            return
        again, self._repeated = self._repeated > 0, max(0, self._repeated - 1)
        for tracker in list(self._trackers):
            if tracker.forgets or not again or tracker in self._new:
                self._tell_of(record, tracker)

    def rewind(self, *, offset: int, step: int) -> None:
        """Drop what lies behind `offset` bytes and step `step`: training was rolled back and takes another course."""
        os.ftruncate(self._file.fileno(), offset)
        self._hash = _digest(Path(self._file.name))
        self._repeated = 0
        scratch.write_sealed(self._told, {"records": 0, "trackers": self._names})
        for tracker in list(self._trackers):
            self._tell(tracker, lambda it: it.rewind(step))

    def sync(self) -> dict[str, Any]:
        """Bring everything to the disk; returns {bytes, xxh3_128} of log.jsonl."""
        os.fsync(self._file.fileno())
        for tracker in list(self._trackers):
            self._tell(tracker, lambda it: it.flush())
        return {"bytes": os.fstat(self._file.fileno()).st_size, "xxh3_128": self._hash.hexdigest()}

    def close(self, *, failed: bool = False) -> None:
        """`failed`: training ends by an error, which trackers show of the run."""
        self.sync()
        self._file.close()
        for tracker in list(self._trackers):
            self._tell(tracker, lambda it: it.close(failed=failed))

    def _replay(self, path: Path) -> None:
        """Tell trackers that are new to a run what was before them."""
        for line in path.open("rb") if self._new else ():
            if _HAS_NUMBERS.search(line):
                record = json.loads(line)
                for tracker in self._new:
                    if tracker in self._trackers:
                        self._tell_of(record, tracker)

    def _count(self, path: Path, offset: int, *, told: int, trackers: list[str]) -> int:
        """How many records after `offset` the trackers have been told, by this log or by one that was cut off it."""
        kept = there = 0
        at = 0
        with path.open("rb") as file:
            for line in file:
                at += len(line)
                if _HAS_NUMBERS.search(line):
                    there += 1
                    kept += at <= offset
        told = max(told, there)
        scratch.write_sealed(self._told, {"records": told, "trackers": trackers})  # before they go
        return told - kept

    def _tell_of(self, record: Record, tracker: Tracker) -> None:
        self._tell(tracker, lambda it: it.write(record["step"], dict(numbers(record))))

    def _tell(self, tracker: Tracker, call: Callable[[Tracker], None]) -> None:
        try:
            call(tracker)
        except Exception as error:  # a server that is gone, say: no reason to lose the run
            self._trackers.remove(tracker)
            self._say(
                f"{type(tracker).__name__} failed ({type(error).__name__}: {error}); training goes on without it, "
                "and log.jsonl has every number"
            )


def _digest(path: Path) -> Any:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128)


def read(path: Path, kind: str) -> list[Record]:
    """The records of one kind: `step`, `validation` or `event`."""
    records = (json.loads(line) for line in path.read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def loss_csv(records: list[Record]) -> str:
    """The step records as CSV: step,tokens,loss, the parts of the loss that there are, grad_norm,lr, the other rates.

    Losses are in nats per token, parts as they enter the total.
    """
    parts = _keys(record.get("parts", {}) for record in records)
    rates = _keys(record.get("rates", {}) for record in records)
    more = [key for key in ("total",) if any(key in record for record in records)]
    columns = ["step", "tokens", "loss", *parts, *more, "grad_norm", "lr", *(f"lr_{part}" for part in rates)]
    rows = [
        [
            *(record[key] for key in ("step", "tokens", "loss")),
            *(record.get("parts", {}).get(part) for part in parts),
            *(record.get(key) for key in (*more, "grad_norm", "lr")),
            *(record.get("rates", {}).get(part) for part in rates),
        ]
        for record in records
    ]
    return _csv(columns, rows)


def validation_csv(records: list[Record]) -> str:
    """The validation records as CSV: step,tokens,mean and a column for each domain; nats per token."""
    domains = list(records[0]["losses"]) if records else []
    rows = [[r["step"], r["tokens"], r["mean"], *(r["losses"][domain] for domain in domains)] for r in records]
    return _csv(["step", "tokens", "mean", *domains], rows)


def numbers(record: Record) -> list[tuple[str, float]]:
    """The finite numbers of a record as curves, (name, value); tables, such as every expert's tokens, are left out."""
    return [(f"{record['kind']}/{name}", value) for name, value in _flat(record) if math.isfinite(value)]


def _flat(value: Record, prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, item in value.items():
        if not prefix and key in _NOT_CURVES:
            continue
        if isinstance(item, list):
            item = {} if item and isinstance(item[0], list) else {str(i): entry for i, entry in enumerate(item)}
        if isinstance(item, dict):
            found += _flat(item, f"{prefix}{key}/")
        elif isinstance(item, int | float):
            found.append((prefix + key, item))
    return found


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keys(found: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(key for record in found for key in record))


def _csv(columns: list[str], rows: list[list[Any]]) -> str:
    """At most ROWS rows, evenly spaced, the last among them."""
    rows = rows[:: -max(1, -(-len(rows) // ROWS))][::-1]
    cells = [columns, *([("" if cell is None else str(cell)) for cell in row] for row in rows)]
    return "".join(",".join(row) + "\n" for row in cells)
