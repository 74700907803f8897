"""The log of a run: JSON lines and TensorBoard, cut back to the checkpoint on resume.

A record's `timing` is the only part that differs between an interrupted and an uninterrupted run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tasks.pretrain.job import TrainingError

Record = dict[str, Any]


class Log:
    """Appends records to log.jsonl and, where they are numbers, to TensorBoard."""

    def __init__(self, folder: Path, *, offset: int, step: int) -> None:
        """Go on after `offset` bytes of folder/log.jsonl and after step `step`; what lies behind is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        path.touch()
        if path.stat().st_size < offset:
            raise TrainingError(
                f"{path} has {path.stat().st_size} bytes, but was {offset} long when the checkpoint was written; "
                f"delete {folder.parent} to start over"
            )
        os.truncate(path, offset)
        self._file = path.open("ab")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else 0)

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        for name, value in _numbers(record):
            self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def sync(self) -> int:
        """Bring everything to the disk; returns the length of log.jsonl in bytes."""
        os.fsync(self._file.fileno())
        self._board.flush()
        return self._file.tell()

    def close(self) -> None:
        self.sync()
        self._file.close()
        self._board.close()


def read(path: Path, kind: str) -> list[Record]:
    """The records of one kind: `step` or `heldout`."""
    records = (json.loads(line) for line in path.read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def loss_csv(records: list[Record]) -> str:
    """The step records as CSV: step,tokens,loss,balance,grad_norm,lr."""
    columns = ("step", "tokens", "loss", "balance", "grad_norm", "lr")
    return _csv(columns, [[record[column] for column in columns] for record in records])


def heldout_csv(records: list[Record]) -> str:
    """The held-out records as CSV: step,tokens,mean and a column for each domain; nats per token."""
    domains = list(records[0]["losses"]) if records else []
    rows = [[r["step"], r["tokens"], r["mean"], *(r["losses"][domain] for domain in domains)] for r in records]
    return _csv(("step", "tokens", "mean", *domains), rows)


def _csv(columns: tuple[str, ...], rows: list[list[Any]]) -> str:
    return "".join(",".join(map(str, row)) + "\n" for row in [list(columns), *rows])


def _numbers(record: Record, prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if key == "sampler":  # a state to replay batches from, not a curve
            continue
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in {"step", "tokens"}:
            found.append((prefix + key, value))
    return found
