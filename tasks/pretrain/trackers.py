"""Where the log goes besides log.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio.

Each keeps its files in the log's folder and sends nothing over a network, unless the user's own variables say
otherwise: WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tasks.pretrain.job import TrainingError

PROJECT = "moeforge"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a tracker calls a run by. The same values after an interruption find the same run again."""

    folder: Path
    """Of the log; a tracker's own files go into a folder of its name in it."""
    name: str
    """What a person reads, such as the pipeline."""
    key: str
    """Unique and stable, such as the pipeline and its workspace's fingerprint; letters, digits, - and _."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The settings to show beside the curves."""


class Tracker(Protocol):
    """Takes numbers by step."""

    forgets: bool
    """`rewind` takes back what was written; without it, what an interrupted run wrote must not be written again."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def rewind(self, step: int) -> None:
        """What was written for steps after `step` is void, and comes again."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


def check(names: Sequence[str]) -> None:
    """Raise TrainingError if a tracker's package isn't installed, saying how to get it."""
    raise NotImplementedError


def start(names: Sequence[str], run: Run, *, step: int) -> list[Tracker]:
    """Open each tracker's run, the interrupted one if there is one, to go on after `step`."""
    raise NotImplementedError
