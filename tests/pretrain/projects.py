"""Stages and training processes of a project under test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


def stage(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m …` in a project and return what it printed."""
    with start(*arguments, cwd=cwd, **options) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(*arguments: str, cwd: Path, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start `python -m …` in a project."""
    paths = {"PYTHONPATH": f"{cwd}{os.pathsep}{cwd / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, **paths, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def workers(project: Path) -> list[int]:
    """Process ids of the training processes that run in a project."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            mine = entry.name.isdigit() and (entry / "cwd").readlink() == project
            if mine and b"tasks.pretrain.launch.worker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found


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


def timeless(log: Path) -> list[dict[str, Any]]:
    """A run's log without its timings."""
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in log.read_text().splitlines()]
