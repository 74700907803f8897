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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

GRACE = 10.0
"""Seconds between the request to stop and the end."""


def run(command: list[str]) -> int:
    """Run `command` to its end and return its exit code, or 143 if it was stopped."""
    waited = {signal.SIGTERM, signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, lambda *_: None)  # at its default, macOS drops it while it is blocked
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)  # a handler would miss one that comes just before waitpid()
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, waited),
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the owner too, and the owner decides
    threading.Thread(target=_watch_input, daemon=True).start()
    while (code := child.poll()) is None:
        if signal.sigwait(waited) == signal.SIGTERM:
            end(child.pid)
            return 128 + signal.SIGTERM
    return code


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


def _watch_input() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    code = run(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)  # the watching thread still waits for input
