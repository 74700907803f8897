"""Is a new model good enough to replace the last accepted one? Figures of both, the rule, and the record in git.

runs/PIPELINE/accepted.json: {trained, dense: bits per byte averaged over domains, dvc_lock_sha256, date}.
"""

from __future__ import annotations

import hashlib
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks import scratch
from tasks.evaluate import summary


def figures(pipeline: str) -> dict[str, float]:
    """Bits per byte, averaged over the domains, of the trained model and of its dense parent on the same windows."""
    evaluation = summary.read(pipeline)
    return {model: float(evaluation[model]["bits_per_byte"]["mean"]) for model in ("trained", "dense")}


def refusal(new: float, old: float | None, *, tolerance: float) -> str | None:
    """Why a model of `new` bits per byte is refused beside the accepted `old` one, or None if it is accepted."""
    if not math.isfinite(new):
        return f"refused: {new} bits per byte is not a figure to accept"
    if old is not None and new > old + tolerance:
        return (
            f"refused: {new:.4f} bits per byte is {new - old:.4f} worse than the accepted {old:.4f}; "
            f"allowed: {tolerance:.4f} worse"
        )
    return None


def accepted(pipeline: str) -> dict[str, Any] | None:
    """The record of the last accepted model, or None before the first."""
    path = record(pipeline)
    return json.loads(path.read_text()) if path.exists() else None


def accept(pipeline: str, new: dict[str, float]) -> None:
    """Record a model as the one to beat: its figures, the digest of dvc.lock and the time."""
    lock = hashlib.sha256(Path("dvc.lock").read_bytes()).hexdigest()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    scratch.write_json(record(pipeline), {**new, "dvc_lock_sha256": lock, "date": date})


def record(pipeline: str) -> Path:
    """Where the record stands."""
    return Path("runs", pipeline, "accepted.json")
