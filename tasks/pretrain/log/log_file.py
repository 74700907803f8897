"""The log of a run: JSON lines, cut back to the checkpoint on resume. Trackers get the same numbers.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from tasks import scratch
from tasks.pretrain.job import TrainingError
from tasks.pretrain.log.trackers import Run, Tracker, start

Record = dict[str, Any]

LOG = "log.jsonl"
SENT = "sent.json"  # how many records trackers got, and which trackers: the log may have been cut since

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
        """Continue after `offset` bytes of run.folder/log.jsonl and after step `step`; the rest is cut off.

        Training repeats the steps that were cut off and writes the same numbers. Trackers that cannot rewind get
        none of them twice.

        Args:
            names: of the trackers.
            say: reports a tracker that failed; training goes on without it.

        Raises:
            TrainingError: the log is shorter than `offset`, or a tracker cannot start.
        """
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / LOG
        path.touch()
        if path.stat().st_size < offset:
            raise TrainingError(
                f"{path} has {path.stat().st_size} bytes, but was {offset} long when the checkpoint was written; "
                f"delete {run.folder.parent} to start over"
            )
        self._sent = run.folder / SENT
        try:
            delivery = scratch.read_sealed(self._sent)
        except (FileNotFoundError, ValueError):
            delivery = {}
        known = delivery.get("trackers", [])
        inside, total = _count(path, offset)
        records = max(delivery.get("records", 0), total)
        scratch.write_sealed(self._sent, {"records": records, "trackers": known})  # before the log is cut
        self._repeated = records - inside
        os.truncate(path, offset)
        self._file = path.open("ab")
        self._hash = _digest(path)
        self._say = say
        new = [name for name in names if offset and name not in known]
        self._trackers = start([name for name in names if name not in new], run, step=step)
        self._new = start(new, run, step=0) if new else []
        self._trackers += self._new
        self._send_history(path)
        self._names = sorted({*names, *known})
        scratch.write_sealed(self._sent, {"records": records, "trackers": self._names})

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
            if tracker.rewinds or not again or tracker in self._new:
                self._send(record, tracker)

    def rewind(self, *, offset: int, step: int) -> None:
        """Cut off what follows `offset` bytes and step `step`: training was rolled back and takes another course."""
        os.ftruncate(self._file.fileno(), offset)
        self._hash = _digest(Path(self._file.name))
        self._repeated = 0
        scratch.write_sealed(self._sent, {"records": 0, "trackers": self._names})
        self._call_all(lambda tracker: tracker.rewind(step))

    def sync(self) -> dict[str, Any]:
        """Bring everything to the disk; returns {bytes, xxh3_128} of log.jsonl."""
        os.fsync(self._file.fileno())
        self._call_all(lambda tracker: tracker.flush())
        return {"bytes": os.fstat(self._file.fileno()).st_size, "xxh3_128": self._hash.hexdigest()}

    def close(self, *, failed: bool = False) -> None:
        """`failed`: training ends by an error, which trackers show of the run."""
        self.sync()
        self._file.close()
        self._call_all(lambda tracker: tracker.close(failed=failed))

    def _send_history(self, path: Path) -> None:
        """Send trackers that are new to a run what was logged before."""
        for line in path.open("rb") if self._new else ():
            if _HAS_NUMBERS.search(line):
                record = json.loads(line)
                for tracker in self._new:
                    if tracker in self._trackers:
                        self._send(record, tracker)

    def _send(self, record: Record, tracker: Tracker) -> None:
        self._call(tracker, lambda it: it.write(record["step"], dict(numbers(record))))

    def _call_all(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            self._call(tracker, call)

    def _call(self, tracker: Tracker, call: Callable[[Tracker], None]) -> None:
        try:
            call(tracker)
        except Exception as error:  # such as a server that is gone: no reason to lose the run
            self._trackers.remove(tracker)
            self._say(
                f"{type(tracker).__name__} failed ({type(error).__name__}: {error}); training goes on without it, "
                "and log.jsonl has every number"
            )


def _count(path: Path, offset: int) -> tuple[int, int]:
    """How many records with numbers are in the log's first `offset` bytes, and in all of it."""
    inside = total = position = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            if _HAS_NUMBERS.search(line):
                total += 1
                inside += position <= offset
    return inside, total


def _digest(path: Path) -> Any:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128)


def read(path: Path, *kinds: str) -> list[Record]:
    """The records of some kinds, of `step`, `validation` and `event`, without one that is just being written."""
    with path.open() as lines:
        records = (json.loads(line) for line in lines if line.endswith("\n"))
        return [record for record in records if record["kind"] in kinds]


def loss_csv(records: list[Record]) -> str:
    """The step records as CSV: step,tokens,loss, the parts of the loss, total,grad_norm,lr, other rates.

    Losses are in nats per token, parts as they enter the total.
    """
    parts = _keys(record["parts"] for record in records)
    rates = _keys(record.get("rates", {}) for record in records)
    columns = ["step", "tokens", "loss", *parts, "total", "grad_norm", "lr", *(f"lr_{part}" for part in rates)]
    rows = [
        [
            *(record[key] for key in ("step", "tokens", "loss")),
            *(record["parts"].get(part) for part in parts),
            *(record[key] for key in ("total", "grad_norm", "lr")),
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


def _flat(value: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, item in value.items():
        if not prefix and key in _NOT_CURVES:
            continue
        if isinstance(item, list):
            item = {} if item and isinstance(item[0], list) else {str(i): entry for i, entry in enumerate(item)}
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}/")
        elif isinstance(item, int | float):
            yield prefix + key, item


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keys(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))


def _csv(columns: list[str], rows: list[list[Any]]) -> str:
    """At most ROWS rows, evenly spaced, the last among them."""
    rows = rows[:: -max(1, -(-len(rows) // ROWS))][::-1]
    cells = [columns, *([("" if cell is None else str(cell)) for cell in row] for row in rows)]
    return "".join(",".join(row) + "\n" for row in cells)
