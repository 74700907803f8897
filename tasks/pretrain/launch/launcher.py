"""Starts the workers, streams their output, ends all of them, and reports failed ones as one error.

`pretrain.launcher` says who starts the processes: torchrun on this machine, DeepSpeed's launcher on the machines of a
hostfile, or srun in the Slurm job around the stage. All of them run the same module, `tasks.pretrain.launch.worker`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

from tasks.pretrain.job import Diverged, Job, TrainingError
from tasks.pretrain.launch import environment, out_of_memory, supervise
from tasks.settings import Pretrain

_GRACE = 10.0  # seconds from SIGTERM to SIGKILL
_SLOTS = re.compile(r"(\S+)\s+slots=(\d+)")
_REPORTS = (b"torch/distributed/elastic/", b"torch.distributed.elastic")
_CHATTER = (b"[launch.py:", b"[runner.py:", b"[real_accelerator.py:")
"""Signs of what DeepSpeed's launcher itself prints on stderr."""
_KINDS = ("error", "killed", "unexpected")


class Interrupted(SystemExit):
    """The stage was asked to stop."""


def run(job: Job) -> None:
    """Run the workers of a job to their end.

    Raises:
        TrainingError: they cannot be started, or one failed; the message is the worker's own. Diverged, if it was the
            loss.
        Interrupted: SIGTERM, SIGINT or SIGHUP came; the workers are gone.
    """
    job_file = job.write()
    for old in job.workspace.glob(supervise.FAILURES):
        old.unlink()
    line = command(str(job_file), job.params, environ=os.environ)
    with _interruptible():
        process = subprocess.Popen(
            line,
            env=launcher_environment(job.params, os.environ),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches the stage alone, which then stops the workers
            # pdsh does not pass the lifeline on to other machines; DeepSpeed's launcher ends them on SIGTERM
            preexec_fn=lambda: supervise.die_with_parent(signal.SIGTERM),
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
    failures = [json.loads(path.read_text()) for path in job.workspace.glob(supervise.FAILURES)]
    if code or failures:
        kind = Diverged if any(failure.get("diverged") for failure in failures) else TrainingError
        raise kind(reason(code, failures, params=job.params))
    if not (job.workspace / "pretrain.json").exists():  # DeepSpeed's launcher gives 0 when a signal ended it
        raise TrainingError("the launcher ended before training did. Run again: training goes on from its checkpoint")


def command(job: str, params: Pretrain, *, environ: Mapping[str, str]) -> list[str]:
    """The command line that starts the workers of `job`, a path to job.json.

    Raises:
        TrainingError: the hostfile or the Slurm job does not fit the settings, or a program is missing.
    """
    worker = ["tasks.pretrain.launch.worker", job, "--lifeline"]
    if params.launcher == "hostfile":
        assert params.hostfile is not None
        return [*_deepspeed(Path(params.hostfile), params.processes), *worker]
    if params.launcher == "slurm":
        return [*_srun(params.processes, environ), sys.executable, "-m", *worker]
    return torchrun(worker, processes=params.processes)


def torchrun(module: list[str], *, processes: int) -> list[str]:
    """The command line that runs a module with its arguments on this machine; one process needs no torchrun."""
    if processes == 1:
        return [sys.executable, "-m", *module]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", *module]


def slots(hostfile: Path) -> dict[str, int]:
    """Processes of each host in DeepSpeed's hostfile: a line `host slots=N` a machine; `#` begins a comment.

    Raises:
        TrainingError: there is no such file, or a line is something else.
    """
    if not hostfile.is_file():
        raise TrainingError(f"pretrain.hostfile: {hostfile} is not there; it has a line `host slots=N` a machine")
    hosts: dict[str, int] = {}
    for number, line in enumerate(hostfile.read_text().splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _SLOTS.match(line.strip())
        if match is None or match[1] in hosts:
            raise TrainingError(f"{hostfile}: line {number} ({line.strip()!r}) is not `host slots=N` of a new host")
        hosts[match[1]] = int(match[2])
    return hosts


def _deepspeed(hostfile: Path, processes: int) -> list[str]:
    machines = slots(hostfile)
    if sum(machines.values()) != processes:
        listed = ", ".join(f"{host}: {count}" for host, count in machines.items()) or "none"
        raise TrainingError(
            f"pretrain.processes = {processes}, and {hostfile} has {sum(machines.values())} slots ({listed}); "
            "make them equal"
        )
    local = set(machines) <= {"localhost", "127.0.0.1", socket.gethostname()}
    if not local and shutil.which("pdsh") is None:
        raise TrainingError(
            f"pretrain.launcher: hostfile reaches {', '.join(machines)} by pdsh, and it is not installed here; "
            "install it (Debian: apt-get install pdsh), or set launcher: slurm in a Slurm job"
        )
    return deepspeed_command(hostfile, port=_free_port(), local=local)


def deepspeed_command(hostfile: Path, *, port: int, local: bool) -> list[str]:
    """DeepSpeed's command that starts a module on the machines of a hostfile; the module and its arguments follow.

    Args:
        port: of the first machine, on which the processes meet.
        local: the hostfile has this machine alone, which needs no ssh.
    """
    where = ["--hostfile", str(hostfile), "--master_port", str(port)]
    if local:
        where += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    else:
        where += ["--force_multi"]  # else a single machine of the file would be taken for this one
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    return [*runner, *where, "--no_local_rank", "--module"]


def _srun(processes: int, environ: Mapping[str, str]) -> list[str]:
    if "SLURM_JOB_ID" not in environ:
        raise TrainingError(
            "pretrain.launcher: slurm needs a Slurm job around the stage, and SLURM_JOB_ID is not set; start it by "
            f"`sbatch --ntasks={processes} …` or `salloc`, or set launcher: local"
        )
    tasks = int(environ.get("SLURM_NTASKS", processes))
    if tasks != processes:
        raise TrainingError(
            f"pretrain.processes = {processes}, and the Slurm job has {tasks} tasks (SLURM_NTASKS); make them equal"
        )
    if shutil.which("srun", path=environ.get("PATH")) is None:
        raise TrainingError("pretrain.launcher: slurm starts the workers by `srun`, which is not in PATH")
    # srun gives its standard input to every task, and closes theirs when its own closes: the lifeline
    line = ["srun", f"--ntasks={processes}", "--kill-on-bad-exit=1", "--unbuffered", "--input=all"]
    if "SLURM_CPUS_PER_TASK" in environ:  # which srun does not take from the job since Slurm 22.05
        line.append(f"--cpus-per-task={environ['SLURM_CPUS_PER_TASK']}")
    return line


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def launcher_environment(params: Pretrain, environ: Mapping[str, str]) -> dict[str, str]:
    """The launcher's environment, without what an outer run may have left in it.

    Every worker takes its share of its machine's cores (`environment.complete`); torchrun would set one thread each.
    """
    clean = {name: value for name, value in environ.items() if name not in environment.TORCH}
    if params.launcher == "local":
        clean.setdefault("OMP_NUM_THREADS", str(environment.threads({"LOCAL_SIZE": str(params.processes)})))
    return clean


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


def reason(code: int, failures: list[dict[str, Any]], *, params: Pretrain) -> str:
    """The message for the user: the first failure of the kind that says most, with its rank and host.

    When one rank fails, the others lose their peer or are ended by the launcher.

    Args:
        code: exit status of the launcher, negative for a signal.
        failures: the records of `supervise.report`.
    """
    again = "Run again: training goes on from its checkpoint"
    if not failures:
        if code == -signal.SIGKILL:
            return f"{out_of_memory.killed(params)}. {again}"
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"a training process {how}; its own report stands above. {again}"
    first = min(failures, key=lambda failure: (_KINDS.index(failure["kind"]), failure["time"]))
    which = f"rank {first['rank']} on {first['host']}"
    if first["kind"] == "error":
        alike = [failure for failure in failures if failure["message"] == first["message"]]
        return str(first["message"]) if len(alike) == params.processes else f"{first['message']} ({which})"
    if first["kind"] == "killed":
        killed = out_of_memory.killed(params) if first["signal"] == signal.SIGKILL else f"it was {first['message']}"
        return f"{which}: {killed}. {again}"
    return f"{which} failed: {first['message']}; its own report stands above. {again}"


def _pump(stream: IO[bytes]) -> None:
    """Copy the workers' stderr to ours, without the launchers' reports on a failure that the worker has explained."""
    torchrun = False
    for line in iter(stream.readline, b""):
        torchrun = torchrun or any(sign in line for sign in _REPORTS)
        if not torchrun and not any(sign in line for sign in _CHATTER):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn the signals that ask to stop into Interrupted, so that `finally` blocks run. Threads get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(128 + number)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
