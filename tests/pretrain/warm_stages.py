"""Stages of a project under test as forks of the warm server: neither a stage nor its workers load torch again.

With `env` the stage alone is a fork, and its launcher starts the workers as a user's does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.pretrain.projects import MODULE, WORKER, checkpoints, timeless, wait_for, workers
from tests.warm_processes import Ended, Started, free_port, set_rank

_fork = multiprocessing.get_context("fork")


def stage(
    *arguments: str, cwd: Path, limit: Callable[[], object] | None = None, env: dict[str, str] | None = None
) -> Ended:
    """Run a stage as `python -m …` in a project.

    Args:
        limit: a function of a module, called in its process first.
        env: variables of a run whose workers are no forks, but started by the project's own launcher.
    """
    if env is not None:
        return Started(_stages, [arguments], cwd, limit, env).wait()
    return start(*arguments, cwd=cwd, limit=limit).wait()


def start(*arguments: str, cwd: Path, limit: Callable[[], object] | None = None) -> Started:
    """Start a stage as `python -m …` in a project."""
    return Started(_stages, [arguments], cwd, limit)


def kill_when(condition: Callable[[], object], *, cwd: Path) -> None:
    """Start the stage `pretrain`, kill -9 it as soon as `condition()` is true, and see its workers gone."""
    started = start("tasks.pretrain", "tiny", cwd=cwd)
    wait_for(condition)
    started.process.kill()
    started.wait()
    wait_for(lambda: not workers(cwd), seconds=20)


def killed_and_whole(project: Path) -> list[tuple[str, object]]:
    """Train twice, killed at a checkpoint and then in one piece: digest of the result and log of each run."""
    from tasks import scratch  # not above: a stage must import the project's own copy

    kill_when(lambda: checkpoints(project), cwd=project)
    ended = []
    for going_on in (True, False):
        done = stage("tasks.pretrain", "tiny", cwd=project)
        assert done.returncode == 0, done.stderr
        assert ("going on from the checkpoint" in done.stdout) == going_on
        log = timeless(project / "runs/tiny/training/log.jsonl")
        ended.append((scratch.digest(project / "runs/tiny/trained"), log))
        assert stage("tasks.pretrain", "tiny", "--discard", cwd=project).returncode == 0
    return ended


def stages(*lines: tuple[str, ...], cwd: Path) -> None:
    """Run stages one after the other in one process, each as `python -m …`; all must succeed."""
    done = Started(_stages, lines, cwd, None).wait()
    assert done.returncode == 0, done.stderr


def _stages(
    lines: list[tuple[str, ...]],
    cwd: Path,
    limit: Callable[[], object] | None,
    env: dict[str, str] | None = None,
) -> None:
    os.chdir(cwd)
    sys.path[:0] = [str(cwd), str(cwd / "kernels")]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    if limit is not None:
        limit()
    from tasks.pretrain.launch import launcher

    assert Path(launcher.__file__).is_relative_to(cwd), "the code under test was imported from elsewhere"
    if env is None:
        names = {"PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
        launcher.subprocess = SimpleNamespace(Popen=Workers, **names)  # type: ignore[assignment]
    else:
        os.environ |= env
    for module, *arguments in lines:
        sys.argv = [module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise


class Workers:
    """A job's worker, or as many as torchrun would start: forks of the stage, which sees a subprocess.Popen."""

    def __init__(self, line: list[str], *, env: dict[str, str], preexec_fn: Callable[[], None], **_: Any) -> None:
        (lifeline, stdin), (stderr, errors) = os.pipe(), os.pipe()

        def work() -> None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            preexec_fn()
            os.dup2(lifeline, 0)
            os.dup2(errors, 2)
            for descriptor in (lifeline, stdin, stderr, errors):
                os.close(descriptor)
            Path("/proc/self/comm").write_text(WORKER)
            os.environ.clear()
            os.environ.update(env)
            sys.argv = line[line.index(MODULE) :]
            _ranks(next((int(part.partition("=")[2]) for part in line if part.startswith("--nproc-per-node")), 1))

        self.process = _fork.Process(target=work)
        self.process.start()
        assert self.process.pid is not None
        self.pid, self.terminate = self.process.pid, self.process.terminate
        os.close(lifeline)
        os.close(errors)
        self.stdin, self.stderr = os.fdopen(stdin, "wb", 0), os.fdopen(stderr, "rb")

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("workers", timeout or 0)
        return self.process.exitcode


def _ranks(count: int) -> None:
    """Be the one rank, or start `count` and end all with the first that fails."""
    if count == 1:
        _rank()
    port = free_port()
    ranks = [_fork.Process(target=_rank, args=(rank, count, port)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    while any(rank.exitcode is None for rank in ranks):
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.terminate()
        time.sleep(0.01)
    sys.exit(any(rank.exitcode for rank in ranks))


def _rank(rank: int = 0, count: int = 1, port: int = 0) -> None:
    if count > 1:
        set_rank(rank, world_size=count, port=port)
        os.environ["LOCAL_WORLD_SIZE"] = str(count)
    from tasks.pretrain.launch import worker

    sys.exit(worker.main())
