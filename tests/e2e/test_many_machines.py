"""A corpus made by several runners one after another, some of them killed: the bytes of one plain run."""

from __future__ import annotations

import contextlib
import os
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
from tasks.corpus import __main__ as command
from tasks.corpus import fingerprint
from tasks.corpus.prepare import planning, stage
from tasks.corpus.prepare.planning import Unit
from tasks.corpus.tokenizer import encoder
from tests.conftest import SETTINGS
from tests.flows.conftest import alive, server, until

__all__ = ["server"]

pytestmark = pytest.mark.e2e

CORPUS = Path("data/corpora/tiny")
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
SCAN, PART = "scan/code-*/00003-000.arrow", "code/*/part-00004-000.arrow"


def write_settings(model: Path) -> None:
    """Write the settings of the tiny project, its corpus cut into about ten tasks, its sources named from here."""
    settings = SETTINGS.format(model=model, data="texts")
    Path("pipelines.yaml").write_text(settings.replace("heldout: 0.2", "heldout: 0.2\n    task_bytes: 100000"))


def prepare(model: Path) -> None:
    """Make what a corpus needs, without DVC."""
    Path("data/models").mkdir(parents=True)
    Path("data/models/tiny").symlink_to(model)
    sys.argv = ["fingerprint", "tiny"]
    assert fingerprint.main() == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> str:
    """The digest of a run by one process from nothing."""
    with contextlib.chdir(tmp_path_factory.mktemp("plain")):
        Path("texts").symlink_to(tiny_data)
        write_settings(tiny_model)
        prepare(tiny_model)
        stage.make("tiny", run=stage.processes(1))
        return scratch.digest(CORPUS)


@pytest.fixture
def project(tiny_project: Path, tiny_model: Path) -> Path:
    """The tiny project, whose code stops where `hold` says."""
    write_settings(tiny_model)
    with (tiny_project / "tasks/corpus/files.py").open("a") as file:
        file.write(HOLD)
    return tiny_project


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


def test_threads_have_an_encoder_each_and_give_the_bytes_of_a_plain_run(
    project: Path, tiny_model: Path, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tiny_model)
    loaded = []

    def noted(*arguments: Any, **keywords: Any) -> encoder.Encoder:
        loaded.append(threading.get_ident())
        return encoder.load_encoder(*arguments, **keywords)

    monkeypatch.setattr(stage, "_encoders", planning.PerThread(noted, most=2))
    together = threading.Barrier(3)

    def threads(function: Callable[[Unit], None], units: list[Unit]) -> None:
        with ThreadPoolExecutor(3, initializer=together.wait if len(units) > 2 else None) as pool:
            list(pool.map(function, units))

    stage.make("tiny", run=threads)
    assert scratch.digest(CORPUS) == plain
    assert len(set(loaded)) >= 3


def test_array_members_one_killed_and_other_numbers_of_them_give_the_bytes_of_a_plain_run(
    project: Path, tiny_model: Path, plain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tiny_model)

    def here(*arguments: str) -> int:
        sys.argv = ["corpus", "tiny", *arguments]
        return command.main()

    def shares(phase: str, of: int) -> list[list[str]]:
        return [["--phase", phase, "--num-tasks", str(of), "--task-index", str(index)] for index in range(of)]

    Path("hold").write_text(SCAN)
    kill_where_held(*(start("tasks.corpus", "tiny", *share) for share in shares("scan", 2)), at=SCAN)
    assert here("--phase", "resolve") == 1
    assert "phase resolve of corpus tiny needs phase scan" in capsys.readouterr().err
    assert [here(*share) for share in shares("scan", 3)] == [0, 0, 0]
    assert here("--phase", "resolve") == 0
    Path("hold").write_text(PART)
    kill_where_held(*(start("tasks.corpus", "tiny", *share) for share in shares("tokenise", 2)), at=PART)
    end(start("tasks.corpus", "tiny", "--workers", "2"))
    assert scratch.digest(CORPUS) == plain


def test_a_dask_run_that_is_killed_is_finished_by_processes_with_the_bytes_of_a_plain_run(
    project: Path, tiny_repo: Path, server: dict[str, str], plain: str
) -> None:
    pytest.importorskip("prefect_dask")
    Path("hold").write_text(SCAN)
    kill_where_held(start("flows.cli", "tokenise", "tiny", "--runner", "dask", "--workers", "1", **server), at=SCAN)
    assert Path("data/models/tiny").is_dir()
    assert not CORPUS.exists()

    output = end(start("flows.cli", "tokenise", "tiny", "--workers", "1", **server))
    assert "model@tiny | == cached" in output
    assert "tiny: done in" in output
    assert scratch.digest(CORPUS) == plain
    assert "up to date" in end(start("dvc", "status", "corpus@tiny"))
