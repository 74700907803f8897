"""A tiny project whose stages up to `partition` have run, and one with the uninterrupted run that others end like."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.conftest import SETTINGS

from .warm_stages import stage, stages

ROOT = Path(__file__).parents[2]
STEPS = 12


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one of xdist's workers makes for all."""
    base = factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f"{name}-unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> Path:
    """A project in which only `pretrain` is left to run: 12 steps of 4 x 64 tokens, a checkpoint every second one."""
    settings = SETTINGS.format(model=tiny_model, data=tiny_data).replace("tokens: 1536", f"tokens: {STEPS * 256}")
    settings = settings.replace("micro_batch: 2", "micro_batch: 1")  # the balance loss of a window is its own then
    settings = settings.replace("warmup_tokens:", "schedule: wsd\n      decay_share: 0.5\n      warmup_tokens:")

    def make(folder: Path) -> None:
        for name in ("tasks", "kernels"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "pipelines.yaml").write_text(settings)
        names = ("moe.dense", "corpus.fingerprint", "corpus", "partition", "mixture")
        stages(*((f"tasks.{name}", "tiny") for name in names), cwd=folder)
        for split in (folder / "data/corpora").glob("*/*/test"):
            shutil.rmtree(split)  # only tasks/evaluate may open it

    return made_once(tmp_path_factory, "prepared", make)


def hide_compilers() -> None:
    """Leave this process, and those that it starts, without a compiler."""
    os.environ |= {"PATH": "/nonexistent", "CXX": "/nonexistent/c++"}


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the prepared project; the test runs inside it."""
    folder = tmp_path / "project"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after an uninterrupted run by its command, made without a compiler in reach."""

    def make(folder: Path) -> None:
        shutil.copytree(prepared, folder)
        done = stage("tasks.pretrain", "tiny", cwd=folder, limit=hide_compilers)
        assert done.returncode == 0, done.stderr
        assert json.loads((folder / "runs/tiny/pretrain.json").read_text())["steps"] == STEPS

    return made_once(tmp_path_factory, "finished", make)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process in a group of its own, as a run of one process has it."""
    from tasks.pretrain.engine import distributed

    distributed.join(tmp_path_factory.mktemp("group"))
    yield
    distributed.leave()
