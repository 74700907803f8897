"""The stage killed, on a full disk, and run twice at once: what is published is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tasks.corpus import __main__ as main
from tasks.corpus.prepare import stage
from tasks.tools import verify_corpus as verify
from tests.corpus.prepare import crashes
from tests.corpus.texts import ROOT, Project, run, sentences
from tests.flows.conftest import alive, until

KILLS = 14


@pytest.fixture
def clean(project: Project) -> str:
    """The result of a run that is not disturbed, of which nothing is left.

    There is something for every file that the stage writes: parts, rejects, both kinds of duplicates.
    """
    texts = sentences(100, seed=1)
    near = [text.replace("0", "9", 1) for text in texts[:20]]
    project(
        {"prose": texts, "code": [*sentences(60, seed=2), "short", *near, *texts[:5]]},
        shard_tokens=1000,
        task_bytes=12000,
        filters=[{"rule": "length", "min_chars": 20}],
        keep_rejects=True,
        near_duplicates={},
    )
    run()
    digest = crashes.result()
    crashes.clear()
    return digest


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-B", *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_killed_at_many_calls_every_run_that_ends_gives_the_bytes_of_an_undisturbed_one(clean: str) -> None:
    process = start(str(ROOT / "tests/corpus/prepare/crashes.py"), str(KILLS), "0")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    counts = json.loads(output)
    assert counts["killed"] == KILLS
    assert counts["ended"] > 0
    assert counts["left"] == [".scratch/corpus-tiny/lock"]
    assert crashes.result() == clean
    assert verify.verify_corpus(crashes.CORPUS) == []


def test_killed_with_its_workers_at_work_it_leaves_none_of_them_and_goes_on(clean: str) -> None:
    process = start("-m", "tasks.corpus", "tiny", "--workers", "2")
    children: list[psutil.Process] = []
    while len(children) < 2 and process.poll() is None:  # a worker, and what keeps its semaphores
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.01)
    process.kill()
    process.communicate()
    until(lambda: not any(alive(child.pid) for child in children), seconds=30)
    run()
    assert crashes.result() == clean


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full as soon as a file has `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "written"), [(30_000, r"scan/prose-\w+/00000-000.arrow"), (200_000, "prose/train/part-00000-000.arrow")]
)
def test_on_a_full_disk_it_fails_naming_the_file_keeps_what_was_published_and_then_goes_on(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int, written: str
) -> None:
    texts = {"prose": [8 * text for text in sentences(1000, seed=1)]}  # small in the scan's files, large in shards
    project(texts)
    run()
    published = crashes.result()
    project(texts, seed=1)
    monkeypatch.setattr(sys, "argv", ["corpus", "tiny", "--workers", "1"])
    with largest_file(size):
        assert main.main() == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("corpus tiny: ")]
    assert "File too large: '.scratch/corpus-tiny/" in line
    assert re.search(f"/{written}'$", line)
    assert crashes.result() == published
    run()
    continued = crashes.result()
    assert continued != published
    crashes.clear()
    run()
    assert crashes.result() == continued
    assert not list(Path().rglob("*.tmp-*"))


def test_two_members_of_an_array_on_the_same_units_at_once_give_the_same_bytes(clean: str) -> None:
    together = threading.Barrier(2)

    def member(phase: str) -> None:
        together.wait()
        stage.run_share("tiny", phase=phase, index=0, count=1)

    for phase in ("scan", "tokenise"):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(member, [phase] * 2))
        if phase == "scan":
            stage.run_share("tiny", phase="resolve", index=0, count=1)
    run()
    assert crashes.result() == clean
