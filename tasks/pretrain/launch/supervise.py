"""Supervises a training process: ends it with its launcher, and reports how it failed.

The process forks before anything heavy is loaded. The child trains; the parent, which is small, waits for it. So a
child that the kernel kills for its memory is reported too, with rank and host: DeepSpeed's launcher and srun do not
say which process died.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks import scratch
from tasks.pretrain.job import Diverged, TrainingError
from tasks.pretrain.launch import environment

FAILURES = "failure-*.json"
_ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def run(train: Callable[[], None], *, workspace: Path, lifeline: bool) -> int:
    """Train in a child process, write down how it failed if it did, and return its exit status.

    Args:
        train: its TrainingError, ValueError and OSError are messages for the user; others get a traceback.
        workspace: gets `failure-<rank>.json`: kind (`error`, `killed`, `unexpected`), message, rank, host, time, and
            the signal if killed.
        lifeline: end as soon as standard input closes, whose other end the launcher holds.
    """
    waited = {*_ASKED, signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, lambda *_: None)  # at its default, macOS drops it while it is blocked
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, waited)
        die_with_parent(signal.SIGKILL)
        if lifeline:
            _end_with_input()
        return _train(train, workspace=workspace, quiet=lifeline)

    # Signals stay blocked and are taken one by one: a handler beside waitpid() would miss one that comes just before
    # it. They stay blocked to the end: the launcher ends all ranks when one fails, and this report must be written.
    ended, status = 0, 0
    while not ended:
        number = signal.sigwait(waited)
        if number == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)  # 0 if the child was only stopped
        else:
            os.kill(child, number)  # not reaped yet, so the id is its own
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    if -code not in _ASKED:
        name = signal.Signals(-code).name
        report(workspace, kind="killed", message=f"killed by signal {-code} ({name})", signal=-code)
    return 128 - code  # as a shell would say it


def report(workspace: Path, *, kind: str, message: str, **more: Any) -> None:
    """Write workspace/failure-<rank>.json; on a full disk only the launcher's own message remains."""
    rank = environment.rank(os.environ)
    record = {"kind": kind, "message": message, "rank": rank, "host": socket.gethostname(), "time": time.time()}
    try:
        scratch.write_json(workspace / FAILURES.replace("*", str(rank)), record | more)
    except OSError as error:
        print(f"pretrain: {message} ({error})", file=sys.stderr, flush=True)


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def _train(train: Callable[[], None], *, workspace: Path, quiet: bool) -> int:
    try:
        train()
    except (TrainingError, ValueError, OSError) as error:
        report(workspace, kind="error", message=str(error), diverged=isinstance(error, Diverged))
        if not quiet:  # else the stage prints it
            print(f"pretrain: {error}", file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        traceback.print_exc()
        report(workspace, kind="unexpected", message=f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    return 0


def _end_with_input() -> None:
    def wait() -> None:
        os.read(0, 1)  # returns at end of file; sys.stdin would hold a lock at exit
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
