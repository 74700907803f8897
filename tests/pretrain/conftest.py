"""A tiny project whose stages up to `partition` have run, once for all tests of this folder."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import SETTINGS

from .projects import stage

ROOT = Path(__file__).parents[2]
STEPS = 12


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> Path:
    """A project in which only `pretrain` is left to run: 12 steps of 4 x 64 tokens, a checkpoint every second one."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("tasks", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = SETTINGS.format(model=tiny_model, data=tiny_data).replace("tokens: 1536", f"tokens: {STEPS * 256}")
    settings = settings.replace("micro_batch: 2", "micro_batch: 1")  # the balance loss of a window is its own then
    settings = settings.replace("warmup_tokens:", "schedule: wsd\n      decay_share: 0.5\n      warmup_tokens:")
    (folder / "pipelines.yaml").write_text(settings)
    for name in ("moe.dense", "corpus.fingerprint", "corpus", "mixture", "partition"):
        done = stage(f"tasks.{name}", "tiny", cwd=folder)
        assert done.returncode == 0, done.stderr
        for split in (folder / "data/corpora").glob("*/*/test"):
            shutil.rmtree(split)  # only tasks/evaluate may open it
    return folder


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the prepared project; the test runs inside it."""
    folder = tmp_path / "project"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def finished(
    prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The project after an uninterrupted run, made without a compiler in reach; and what that run printed."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(prepared, folder)
    done = stage("tasks.pretrain", "tiny", cwd=folder, env={"PATH": "/nonexistent", "CXX": "/nonexistent/c++"})
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "runs/tiny/pretrain.json").read_text())["steps"] == STEPS
    return folder, done
