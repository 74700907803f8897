"""The process around a training process: what it writes down, and what it passes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.conftest import ROOT
from tests.pretrain.projects import wait_for

CHILD = """
import os, signal, sys, time
from pathlib import Path
from tasks.pretrain.launch import supervise
from tasks.pretrain.job import TrainingError
def train():
    Path("child").write_text(str(os.getpid()))
    {body}
sys.exit(supervise.run(train, workspace=Path("."), lifeline={lifeline}))
"""


def start(folder: Path, body: str, *, lifeline: bool = False, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(body=body, lifeline=lifeline)],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def failures(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in folder.glob("failure-*.json")]


@pytest.mark.parametrize(
    ("body", "kind", "message", "status"),
    [
        ("raise TrainingError('no room')", "error", "no room", 1),
        ("raise OSError(28, 'No space left', 'x')", "error", "[Errno 28] No space left: 'x'", 1),
        ("raise RuntimeError('lost a peer')", "unexpected", "RuntimeError: lost a peer", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed", "killed by signal 9 (SIGKILL)", 137),
        ("os.abort()", "killed", "killed by signal 6 (SIGABRT)", 134),
    ],
)
def test_how_a_process_failed_is_written_down_with_rank_and_host(
    tmp_path: Path, body: str, kind: str, message: str, status: int
) -> None:
    with start(tmp_path, body, RANK="5") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == status
    (result,) = failures(tmp_path)
    assert (result["kind"], result["message"], result["rank"]) == (kind, message, 5)
    assert result["host"] == os.uname().nodename
    assert ("Traceback" in err) == (kind == "unexpected")


def test_a_process_that_ends_well_or_is_asked_to_stop_leaves_no_report(tmp_path: Path) -> None:
    with start(tmp_path, "pass") as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    (tmp_path / "child").unlink()
    with start(tmp_path, "time.sleep(600)") as process:
        wait_for((tmp_path / "child").exists)
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert failures(tmp_path) == []


@pytest.mark.parametrize("end", ["close the lifeline", "kill the parent"])
def test_the_child_does_not_outlive_its_lifeline_or_its_parent(tmp_path: Path, end: str) -> None:
    with start(tmp_path, "time.sleep(600)", lifeline=True) as process:
        wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
        child = int((tmp_path / "child").read_text())
        assert process.stdin is not None
        if end == "close the lifeline":
            process.stdin.close()
        else:
            process.kill()
        wait_for(
            lambda: not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes()
        )
    assert failures(tmp_path) == []
