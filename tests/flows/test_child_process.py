"""A command run by child_process.py ends with its owner."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows import child_process
from tests.flows.conftest import alive, until

# A parent and a child in a session of its own, as torchrun starts its workers; both ignore the polite request.
STUBBORN = """
import signal, subprocess, sys, time, os
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, child_process.__file__, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_it_passes_on_output_and_exit_code() -> None:
    with start(sys.executable, "-c", "print('said'); raise SystemExit(7)") as process:
        assert process.stdout.read() == "said\n"
    assert process.returncode == 7


@pytest.mark.parametrize("how", ["input closes", "SIGTERM"])
def test_it_ends_the_whole_tree_of_processes_when(how: str) -> None:
    command = STUBBORN.replace("signal.SIG_IGN", "signal.SIG_DFL")
    with start(sys.executable, "-c", command) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert all(map(alive, pids))
        process.stdin.close() if how == "input closes" else process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    assert not any(map(alive, pids))


def test_it_kills_what_ignores_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "GRACE", 0.3)
    child = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    pids = [int(pid) for pid in child.stdout.readline().split()]
    child_process.end(child.pid)
    until(lambda: child.poll() is not None and not any(map(alive, pids)), seconds=10)


def test_ctrl_c_is_left_to_the_owner(tmp_path: Path) -> None:
    with start(
        sys.executable, "-c", "import time; print('up', flush=True); time.sleep(0.5); print('done')"
    ) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "done\n"
    assert process.returncode == 0
