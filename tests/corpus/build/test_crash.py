from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks import scratch
from tasks.corpus.build import stage
from tasks.tools import verify_corpus as verify
from tests.corpus.build import crashes
from tests.corpus.texts import jsonl, run, sentences

ROOT = Path(__file__).parents[3]
Project = Callable[..., Path]
KILLS = 25


@pytest.fixture
def tasks_of_two_domains(project: Project, tmp_path: Path) -> Path:
    """A project with something for every file that the stage writes: parts, rejects, both kinds of duplicates."""
    texts = sentences(100, seed=1)
    near = [text.replace("0", "9", 1) for text in texts[:20]]
    two = {
        "prose": {"source": jsonl(tmp_path / "prose.jsonl", texts)},
        "code": {"source": jsonl(tmp_path / "code.jsonl", [*sentences(60, seed=2), "short", *near, *texts[:5]])},
    }
    knobs = {
        "shard_tokens": 1000,
        "task_bytes": 12000,
        "filters": [{"rule": "length", "min_chars": 20}],
        "keep_rejects": True,
        "near_duplicates": {},
    }
    return project(two, **knobs)


def start(*arguments: str, file_bytes: int | None = None) -> subprocess.Popen[str]:
    """Run a module in a session of its own, at most writing files of `file_bytes`."""

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.Popen(
        [sys.executable, "-B", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limit,
    )


def test_killed_at_many_calls_every_run_that_ends_gives_the_bytes_of_an_undisturbed_one(
    tasks_of_two_domains: Path,
) -> None:
    run()
    clean = crashes.result()
    process = start(str(ROOT / "tests/corpus/build/crashes.py"), str(KILLS), "0")
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    found = json.loads(told)
    assert found["killed"] == KILLS
    assert found["ended"] > 1
    assert found["left"] == [".scratch/corpus-tiny/lock"]
    assert crashes.result() == clean
    assert verify.verify_corpus(crashes.CORPUS) == []


def alive(session: int) -> list[int]:
    """Processes of a session that are no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.read_text().split(" (", 1)
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, _, owner = rest.rsplit(") ", 1)[1].split()[:4]
        if int(owner) == session and state != "Z":
            found.append(int(pid))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_killed_with_its_workers_at_work_it_leaves_none_of_them_and_goes_on(tasks_of_two_domains: Path) -> None:
    run()
    clean = crashes.result()
    crashes.clear()
    process = start("-m", "tasks.corpus", "tiny", "--workers", "2")
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if len(alive(process.pid)) > 2:  # it has workers
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while left := alive(process.pid):
        assert time.monotonic() < deadline, f"still alive: {left}"
        time.sleep(0.05)
    run()
    assert crashes.result() == clean


def test_on_a_full_disk_it_fails_naming_the_file_keeps_what_was_published_and_then_goes_on(
    project: Project, tmp_path: Path
) -> None:
    repetitive = [8 * text for text in sentences(1000, seed=1)]  # small in the scan's files, large in shards
    texts = {"prose": {"source": jsonl(tmp_path / "prose.jsonl", repetitive)}}
    project(texts)
    run()
    published = scratch.digest(crashes.CORPUS)
    project(texts, seed=1)
    places = ((30_000, r"scan/prose-\w+/00000-000.arrow"), (200_000, "prose/train/part-00000-000.arrow"))
    for limit, written in places:
        process = start("-m", "tasks.corpus", "tiny", "--workers", "1", file_bytes=limit)
        _, errors = process.communicate()
        assert process.returncode == 1, errors
        (last,) = [line for line in errors.splitlines() if line.startswith("corpus tiny: ")]
        assert "File too large: '.scratch/corpus-tiny/" in last
        assert re.search(f"/{written}'$", last)
        assert "Traceback" not in errors
        assert scratch.digest(crashes.CORPUS) == published
    run()
    continued = crashes.result()
    assert scratch.digest(crashes.CORPUS) != published
    crashes.clear()
    run()
    assert crashes.result() == continued
    assert not list(Path().rglob("*.tmp-*"))


def test_two_members_of_an_array_on_the_same_units_at_once_give_the_same_bytes(tasks_of_two_domains: Path) -> None:
    run()
    clean = crashes.result()
    crashes.clear()
    for phase in ("scan", "tokenise"):
        processes = [start("-m", "tasks.corpus", "tiny", "--phase", phase) for _ in range(2)]
        for process in processes:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
        if phase == "scan":
            stage.run_share("tiny", phase="resolve", index=0, count=1)
    run()
    assert crashes.result() == clean
