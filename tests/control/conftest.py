"""Tiny projects with a pruned baseline, made from those of the tests of training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.pretrain.conftest import finished, made_once, prepared
from tests.pretrain.projects import wait_for, workers
from tests.pretrain.warm_stages import stage, start

__all__ = ["finished", "prepared"]


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project; the test runs inside it."""
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


def set_control(project: Path, control: str | dict[str, Any], **pretrain: Any) -> None:
    """Write pipelines.tiny.control, and fields of pipelines.tiny.pretrain."""
    path, yaml = project / "pipelines.yaml", YAML()
    content = yaml.load(path)
    content["pipelines"]["tiny"]["control"] = control
    content["pipelines"]["tiny"]["pretrain"].update(pretrain)
    yaml.dump(content, path)


def baseline_of(
    finished: Path, factory: pytest.TempPathFactory, name: str, *, said: str, prepare: Callable[[Path], None]
) -> Path:
    """The finished project with the baseline of an uninterrupted run, made once for all; `said` is what it printed."""

    def make(folder: Path) -> None:
        shutil.copytree(finished, folder)
        prepare(folder)
        done = stage("tasks.control", "tiny", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout

    return made_once(factory, name, make)


def kill_when(project: Path, condition: Callable[[], object]) -> None:
    """Start the stage `control`, kill -9 it as soon as `condition()` is true, and see its workers gone."""
    run = start("tasks.control", "tiny", cwd=project)
    wait_for(condition)
    run.process.kill()
    run.wait()
    wait_for(lambda: not workers(project), seconds=20)


def unfinished(project: Path, pattern: str) -> bool:
    """Whether the unfinished baseline has such a file."""
    return any(project.glob(f".scratch/control-tiny/*/{pattern}"))


def metrics(project: Path) -> dict[str, Any]:
    """The content of control.json."""
    content: dict[str, Any] = json.loads((project / "runs/tiny/control.json").read_text())
    return content
