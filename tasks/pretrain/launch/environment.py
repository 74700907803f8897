"""Reads rank, world size and threads of a process from the environment that its launcher set.

torchrun and DeepSpeed's launcher set torch's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Slurm
sets its own (https://slurm.schedmd.com/srun.html, "output environment variables"), which are translated here. torch is
not imported: it reads OMP_NUM_THREADS when it loads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Literal

from tasks.pretrain.job import TrainingError

Launcher = Literal["local", "hostfile", "slurm"]
TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(15000, 32000)
"""Below those that Linux uses for outgoing connections."""
_BRACKETS = re.compile(r"\[([^\]]*)\]")
_SEPARATOR = re.compile(r",(?![^\[]*\])")


def complete(environ: MutableMapping[str, str], *, launcher: Launcher, processes: int) -> None:
    """Complete `environ` with torch's variables and the number of threads, before torch is loaded.

    Args:
        environ: os.environ of a worker.
        launcher, processes: the settings. A process that no launcher started is alone in its run.

    Raises:
        TrainingError: Slurm's variables are missing, or the launcher started another number of processes.
    """
    if launcher == "slurm":
        environ.update(from_slurm(environ))
    started = int(environ.get("WORLD_SIZE", "1"))
    if started != processes:
        raise TrainingError(
            f"pretrain.processes = {processes}, and {started} were started (WORLD_SIZE); start the stage by "
            "`python -m tasks.pretrain PIPELINE`, which starts as many as it says"
        )
    environ.setdefault("OMP_NUM_THREADS", str(threads(environ)))
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def rank(environ: Mapping[str, str]) -> int:
    """This process's rank, before `complete` too."""
    return int(environ.get("RANK") or environ.get("SLURM_PROCID") or 0)


def from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a task of a Slurm step.

    The first host of the step is the master. The port follows from the job's and the step's number: all tasks of a
    step get the same. A task that sees a single GPU (--gpus-per-task) gets the local rank 0, which is the number of
    its device.

    Raises:
        TrainingError: a variable that srun sets is missing.
    """
    try:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", "0"))
        rank, size = environ["SLURM_PROCID"], environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"]
        local = environ["SLURM_LOCALID"]
    except KeyError as missing:
        raise TrainingError(
            f"{missing.args[0]} is not set: launcher: slurm starts its workers by `srun`, which sets it. Start the "
            "stage inside a Slurm job (sbatch or salloc), or set pretrain.launcher: local"
        ) from None
    devices = environ.get("CUDA_VISIBLE_DEVICES", "")
    return {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": "0" if devices and "," not in devices else local,
        "MASTER_ADDR": next(hosts(nodes)),
        "MASTER_PORT": str(PORTS[(7 * job + step) % len(PORTS)]),
    }


def hosts(nodes: str) -> Iterator[str]:
    """The hosts of a Slurm node list in order: `a[1-2,04],b` is a1, a2, a04, b. Several brackets multiply."""
    for name in _SEPARATOR.split(nodes):
        yield from _expand(name.strip())


def _expand(name: str) -> Iterator[str]:
    bracket = _BRACKETS.search(name)
    if bracket is None:
        yield name
        return
    for part in bracket[1].split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from _expand(f"{name[: bracket.start()]}{number:0{len(first)}d}{name[bracket.end() :]}")


def threads(environ: Mapping[str, str]) -> int:
    """Threads for this process: the task's CPUs under Slurm, else its share of the cores that it may run on."""
    if "SLURM_CPUS_PER_TASK" in environ and "SLURM_PROCID" in environ:
        return int(environ["SLURM_CPUS_PER_TASK"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_processes(environ))


def local_processes(environ: Mapping[str, str]) -> int:
    """Processes of the run on this machine: torchrun's LOCAL_WORLD_SIZE, DeepSpeed's LOCAL_SIZE, or Slurm's tasks."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in environ:
            return int(environ[name])
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 8(x3),4: 8 on each of three nodes, then 4
    node, at = int(environ.get("SLURM_NODEID", "0")), 0
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", tasks):
        at += int(times or 1)
        if node < at:
            return int(count)
    return 1
