"""What several benchmarks need: arguments, child processes that see this checkout, memory, and times."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def environment(project: Path = ROOT, **more: str) -> dict[str, str]:
    """This process's environment, with the code of `project` on Python's path, and with `more`."""
    return os.environ | {"PYTHONPATH": f"{project}{os.pathsep}{project / 'kernels'}"} | more


def child(module: str, *arguments: str) -> Any:
    """Run `python -m module` in a process of its own; the JSON value in the last line that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
    return json.loads(done.stdout.splitlines()[-1])


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, or VmHWM, its peak.

    What getrusage gives begins with the peak of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process, threads included, that one call takes."""
    start = time.process_time()
    work()
    return time.process_time() - start
