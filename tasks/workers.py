"""Worker processes of one machine: how many, what they inherit, and that they end with their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator

WORKER_KILLED = (
    "a worker process was killed, perhaps for want of memory; run again with fewer --workers. Finished parts are kept"
)
"""The message for concurrent.futures' BrokenProcessPool."""


def cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """End this worker when its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def default_environment(changed: dict[str, str]) -> Iterator[None]:
    """Set environment variables, unless they are set, for the processes that the block starts."""
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update({name: value for name, value in changed.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
