"""Stages and training processes of a project under test."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

MODULE = "tasks.pretrain.launch.worker"
WORKER = "stage-worker"
"""What a worker's process is called: the module, or its name if it was forked (warm_stages.py)."""


def processes(project: Path) -> Iterator[Path]:
    """The folders in /proc of the other processes that run in a project."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            if entry.name.isdigit() and int(entry.name) != os.getpid() and (entry / "cwd").readlink() == project:
                yield entry


def workers(project: Path) -> list[int]:
    """Process ids of the training processes that run in a project."""
    ids = []
    for entry in processes(project):
        with contextlib.suppress(OSError):
            if WORKER in (entry / "comm").read_text() or MODULE in (entry / "cmdline").read_text():
                ids.append(int(entry.name))
    return ids


def checkpoints(project: Path, *, folder: str = "pretrain-tiny") -> list[Path]:
    """The checkpoints of a pipeline's unfinished run, the newest last."""
    return sorted(project.glob(f".scratch/{folder}/*/checkpoints/step-*"))


def wait_for(condition: Callable[[], object], *, seconds: float = 120) -> None:
    """Return as soon as `condition()` is true, which may last milliseconds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def configure(project: Path, **fields: Any) -> None:
    """Change fields of pipelines.tiny.pretrain."""
    path = project / "pipelines.yaml"
    yaml = YAML()
    content = yaml.load(path)
    content["pipelines"]["tiny"]["pretrain"].update(fields)
    yaml.dump(content, path)


def assert_same_run(project: Path, reference: Path) -> None:
    """Fail unless the trained model, the log and the tables of two projects are the same, timings aside."""
    from tasks import scratch  # late: a forked stage imports its project's own code

    run, expected = project / "runs/tiny", reference / "runs/tiny"
    assert timeless(run / "training/log.jsonl") == timeless(expected / "training/log.jsonl")
    assert scratch.digest(run / "trained") == scratch.digest(expected / "trained")
    for name in ("loss.csv", "validation.csv", "training/expert_load.json", "training/deepspeed.json"):
        assert (run / name).read_bytes() == (expected / name).read_bytes()


def timeless(log: Path) -> list[dict[str, Any]]:
    """A run's log without its timings."""
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in log.read_text().splitlines()]
