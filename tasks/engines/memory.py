"""Peak memory of a process that loads one model and reads one prompt.

    python -m tasks.engines.memory < request.json

Models that take turns in one process cannot be told apart, so each is loaded once more, alone. The peak is that of the
resident memory (VmHWM): weights, cache, buffers and libraries, and the pages of a mapped file that were read.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from tasks.engines import llama_cpp, turns


def peak() -> int:
    """Bytes of this process at most until now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) << 10


def forget_peak() -> None:
    """Let the peak begin with what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")


def in_fork(measure: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What `measure` returns in a copy of this process, whose peak begins with what is in use now; {} if it fails.

    The caller must not have run anything in several threads yet: a copy has one.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_send, args=(measure, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, int] = receiver.recv()
    except EOFError:
        found = {}
    process.join()
    return found


def _send(measure: Callable[[], dict[str, int]], sender: Connection) -> None:
    sender.send(measure())


def of_file(file: Path, text: turns.Text, *, threads: int) -> int | None:
    """Bytes of a process with llama.cpp that reads the prompt of `text` with a GGUF file; None if it refuses."""
    request = {"file": str(file), "ids": text.ids[: text.prompt], "length": text.length, "threads": threads}
    command = [sys.executable, "-m", "tasks.engines.memory"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    return None if done.returncode else int(done.stdout.splitlines()[-1])


def _main() -> int:
    request = json.load(sys.stdin)
    model = llama_cpp.Model(request["file"], length=request["length"], threads=request["threads"])
    model.read(request["ids"])
    print(peak())
    return 0


if __name__ == "__main__":
    sys.exit(_main())
