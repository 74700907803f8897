"""Run a command that cannot outlive whoever started it.

    python flows/child_process.py COMMAND [ARGUMENT ...]

The command gets a session of its own. When standard input closes or SIGTERM arrives, its whole tree of processes gets
SIGTERM and, GRACE seconds later, SIGKILL. Standard input also closes when the owner dies, even by kill -9. torchrun
puts its workers into sessions of their own, so a signal to the process group would miss them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

GRACE = 10.0
"""Seconds between the request to stop and the end."""


class Stop(BaseException):
    """The owner wants the command to end."""


def run(command: list[str]) -> int:
    """Run `command` to its end and return its exit code, or 143 if it was stopped."""
    signal.signal(signal.SIGTERM, _stop)
    child = None
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the owner too, and the owner decides
        threading.Thread(target=_watch_input, daemon=True).start()
        return child.wait()
    except Stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if child:
            end(child.pid)
        return 128 + signal.SIGTERM


def end(pid: int) -> None:
    """Stop a process and all that descend from it; kill what is left after GRACE seconds."""
    import psutil

    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(tree, timeout=GRACE)
    late = [child for process in alive for child in _children(process)]
    for process in {*alive, *late}:
        _signal(process, signal.SIGKILL)


def _children(process: psutil.Process) -> list[psutil.Process]:
    import psutil

    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _signal(process: psutil.Process, number: int) -> None:
    import psutil

    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stop


def _watch_input() -> None:
    while os.read(0, 1024):
        pass
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # it alone waits, and must wake


if __name__ == "__main__":
    code = run(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)  # the watching thread still waits for input
