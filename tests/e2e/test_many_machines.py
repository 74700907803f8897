"""A corpus made by several runners one after another, some of them killed: the bytes of one plain run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks import scratch
from tasks.corpus.build import stage
from tasks.corpus.build.planning import Unit
from tasks.corpus.tokenizer import encoder
from tests.flows.conftest import alive, server, until

__all__ = ["server"]

pytestmark = pytest.mark.e2e

# Stops before a chosen file gets its name: the worst moment to be killed at.
HOLD = """

import time

_replace = os.replace


def _hold(source: str, target: str) -> None:
    if Path("hold").exists() and Path(target).match(Path("hold").read_text()):
        Path("held.part").write_text(str(os.getpid()))
        _replace("held.part", "held")
        time.sleep(600)
    _replace(source, target)


os.replace = _hold
"""
SCAN, PART = "scan/code-*/00005-000.arrow", "code/*/part-00007-000.arrow"


def fit_with_hold(project: Path) -> None:
    """Cut the tiny corpus into about fifty tasks, and let its code stop where `hold` says."""
    settings = project / "pipelines.yaml"
    settings.write_text(settings.read_text().replace("heldout: 0.2", "heldout: 0.2\n    task_bytes: 40000"))
    with (project / "tasks/corpus/files.py").open("a") as file:
        file.write(HOLD)


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str], *, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def kill_where_held(*processes: subprocess.Popen[str], at: str) -> None:
    """Wait until one of them, or a child of one, holds `at`; kill -9 that one, and let the others end."""
    until(Path("held").exists, seconds=200, otherwise=lambda: f"nobody came to {at}")
    holder = int(Path("held").read_text())
    (owner,) = (process for process in processes if holder in (process.pid, *_children(process)))
    owner.kill()
    end(owner, code=-signal.SIGKILL)
    until(lambda: not alive(holder), seconds=60, otherwise=lambda: f"process {holder} outlives its run")
    for other in set(processes) - {owner}:
        end(other)
    for name in ("hold", "held"):
        Path(name).unlink()


def _children(process: subprocess.Popen[str]) -> list[int]:
    return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]


def digest() -> str:
    return scratch.digest(Path("data/corpora/tiny"))


def plain() -> str:
    """The digest of a run by one process from nothing."""
    shutil.rmtree("data/corpora/tiny", ignore_errors=True)
    shutil.rmtree(".scratch/corpus-tiny", ignore_errors=True)
    stage.make("tiny", run=stage.processes(1))
    return digest()


def _prepare(model: Path) -> None:
    """What a corpus needs, without DVC."""
    Path("data/models").mkdir(parents=True)
    Path("data/models/tiny").symlink_to(model)
    end(start("tasks.corpus.fingerprint", "tiny"))


def test_threads_have_an_encoder_each_and_give_the_bytes_of_a_plain_run(
    tiny_project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_with_hold(tiny_project)
    _prepare(tiny_model)
    expected = plain()
    load, loaded = encoder.load_encoder, []

    def noted(*arguments: Any, **keywords: Any) -> encoder.Encoder:
        loaded.append(threading.get_ident())
        return load(*arguments, **keywords)

    monkeypatch.setattr(encoder, "load_encoder", noted)
    together = threading.Barrier(3)

    def threads(function: Callable[[Unit], None], units: list[Unit]) -> None:
        with ThreadPoolExecutor(3, initializer=together.wait if len(units) > 2 else None) as pool:
            list(pool.map(function, units))

    stage.make("tiny", run=threads)
    assert digest() == expected
    assert len(set(loaded)) >= 3


def test_array_members_one_killed_and_other_numbers_of_them_give_the_bytes_of_a_plain_run(
    tiny_project: Path, tiny_model: Path
) -> None:
    fit_with_hold(tiny_project)
    _prepare(tiny_model)

    def members(phase: str, *indices: int, of: int) -> list[subprocess.Popen[str]]:
        share = ("tasks.corpus", "tiny", "--phase", phase, "--num-tasks", str(of), "--task-index")
        return [start(*share, str(index)) for index in indices]

    Path("hold").write_text(SCAN)
    kill_where_held(*members("scan", 0, 1, of=2), at=SCAN)
    said = end(start("tasks.corpus", "tiny", "--phase", "resolve"), code=1)
    assert "phase resolve of corpus tiny needs phase scan" in said
    assert "Traceback" not in said
    for process in members("scan", 0, 1, 2, of=3):
        end(process)
    end(start("tasks.corpus", "tiny", "--phase", "resolve"))
    Path("hold").write_text(PART)
    kill_where_held(*members("tokenise", 0, 1, of=2), at=PART)
    end(start("tasks.corpus", "tiny", "--workers", "2"))
    assert digest() == plain()


def test_a_dask_run_that_is_killed_is_finished_by_processes_with_the_bytes_of_a_plain_run(
    tiny_repo: Path, server: dict[str, str]
) -> None:
    pytest.importorskip("prefect_dask")
    fit_with_hold(tiny_repo)
    Path("hold").write_text(SCAN)
    kill_where_held(start("flows.cli", "tokenise", "tiny", "--runner", "dask", "--workers", "2", **server), at=SCAN)
    assert (tiny_repo / "data/models/tiny").is_dir()
    assert not (tiny_repo / "data/corpora/tiny").exists()

    said = end(start("flows.cli", "tokenise", "tiny", "--workers", "2", **server))
    assert "model@tiny | == cached" in said
    assert "tiny: done in" in said
    found = digest()
    assert "up to date" in end(start("dvc", "status", "corpus@tiny"))
    assert plain() == found


def test_ray_gives_the_bytes_of_a_plain_run(tiny_repo: Path, server: dict[str, str]) -> None:
    pytest.importorskip("prefect_ray")
    fit_with_hold(tiny_repo)
    end(start("flows.cli", "tokenise", "tiny", "--runner", "ray", "--workers", "2", **server))
    found = digest()
    assert plain() == found
