"""Start the workers, stream what they print, leave none behind, and turn a failed one into one error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO

from tasks.pretrain.job import Job, TrainingError
from tasks.pretrain.worker import FAILURE

_GRACE = 10.0  # seconds from SIGTERM to SIGKILL


class Interrupted(SystemExit):
    """The stage was asked to stop."""


def run(job: Job) -> None:
    """Run the workers of a job to their end.

    Raises:
        TrainingError: one failed; the message is the worker's own.
        Interrupted: SIGTERM, SIGINT or SIGHUP came; the workers are gone.
    """
    path = job.write()
    failure = job.workspace / FAILURE
    failure.unlink(missing_ok=True)
    processes = job.params.processes
    with _interruptible():
        process = subprocess.Popen(
            command(str(path), processes),
            env=environment(processes),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches the stage alone, which then stops the workers
        )
        assert process.stdin is not None
        assert process.stderr is not None
        pump = threading.Thread(target=_pump, args=(process.stderr,), daemon=True)
        pump.start()
        try:
            code = process.wait()
        finally:
            stop(process)
        pump.join(timeout=_GRACE)
    if code:
        raise TrainingError(_reason(code, json.loads(failure.read_text())["message"] if failure.exists() else None))


def command(job: str, processes: int) -> list[str]:
    """The command line: the worker itself, or torchrun on a port that it finds free."""
    worker = ["-m", "tasks.pretrain.worker", job, "--lifeline"]
    if processes == 1:
        return [sys.executable, *worker]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *worker]


def environment(processes: int) -> dict[str, str]:
    """The workers' environment: the machine's cores are shared out unless OMP_NUM_THREADS is set already."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    left_over = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in left_over}
    return {"OMP_NUM_THREADS": str(max(1, cores // processes)), "TOKENIZERS_PARALLELISM": "false", **kept}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Close the lifeline, which ends every worker, then end the launcher."""
    assert process.stdin is not None
    process.stdin.close()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _reason(code: int, message: str | None) -> str:
    if message:
        return message
    if code == -signal.SIGKILL:
        return (
            "the training process was killed by signal 9: by hand, or because memory ran out (then lower "
            "pretrain.micro_batch or set gradient_checkpointing: true). Run again to go on from the checkpoint"
        )
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    return f"a training process {how}; its own report stands above. Run again: training goes on from its checkpoint"


def _pump(stream: IO[bytes]) -> None:
    """Copy the workers' stderr to ours, without torchrun's report on a failure that the worker has explained."""
    launcher = False
    for line in iter(stream.readline, b""):
        launcher = launcher or b"torch/distributed/elastic/" in line or b"torch.distributed.elastic" in line
        if not launcher:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn the signals that ask to stop into Interrupted, so that `finally` blocks run."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(128 + number)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
