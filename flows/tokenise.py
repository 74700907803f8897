"""Tokenise a corpus on many machines: its units through one of Prefect's task runners, then its stage through DVC.

    moeforge tokenise demo --workers 8                                    # processes on this machine
    moeforge tokenise demo --runner dask --address tcp://node1:8786       # a Dask cluster on a shared file system
    python -m flows.tokenise demo                                         # the same flow, with Prefect's log
    prefect deployment run tokenise/demo                                  # on a server, by a worker

The units leave what they made in the work folder (tasks/corpus/prepare/planning.py), so the stage finds it done and
only publishes; `dvc repro` and this flow leave the same dvc.lock.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.futures import as_completed
from prefect.settings import get_current_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows import dag, environment, stages
from flows.stages import Outcome
from tasks import settings
from tasks.corpus.prepare import stage
from tasks.corpus.prepare.planning import Unit
from tasks.corpus.records import CorpusError
from tasks.pretrain.job import TrainingError
from tasks.workers import WORKER_KILLED, cores, default_environment, end_with_parent

RunnerName = Literal["process", "thread", "dask"]
BATCHES = 8
"""Task runs for each worker and phase: enough that none idles long at a phase's end. Prefect needs milliseconds for
each, whatever it does (docs/orchestration.md)."""
RETRY_DELAYS = [2.0, 15.0]
"""Seconds before each retry of a task run. A new file can take that long to be seen over NFS."""

LOST = ("BrokenProcessPool", "KilledWorker")
"""What a runner raises if its worker died, by name: Dask may not be here. It has tried again by then."""


class RunnerError(ValueError):
    """A task runner that cannot be had; the message says why, and the fix."""


@flow(name="tokenise", persist_result=False)
def tokenise(
    corpus: str = "demo", runner: RunnerName = "process", workers: int | None = None, address: str | None = None
) -> list[Outcome]:
    """Run what is out of date of one corpus, its documents shared out over workers.

    Args:
        corpus: its name in pipelines.yaml.
        runner: what runs the units: processes or threads of this machine, a Dask cluster.
        workers: how many run at once; by default one for each core here, or as many as the cluster has.
        address: of a running Dask scheduler; without it a cluster is started on this machine.

    Raises:
        SettingsError: pipelines.yaml is not valid, or has no such corpus.
        RunnerError: an extra is missing, or the arguments don't go together.
        StageError: a stage failed.
        stage.FAILURES: a unit failed. What was finished is kept for the next run.
    """
    settings.load().corpus(corpus)
    pool = task_runner(runner, workers=workers, address=address)
    *before, last = dag.ancestors(f"corpus@{corpus}")
    outcomes = stages.run(before)
    if dag.changes([last.name])[last.name]:
        slots = None if address else workers or cores()
        with reachable_server():
            share_out.with_options(task_runner=pool)(corpus, workers=slots)
    return outcomes + stages.run([last])


def task_runner(runner: RunnerName, *, workers: int | None, address: str | None) -> TaskRunner[Any]:
    """A Prefect task runner of `workers` workers (one for each core if None), or one that connects to `address`.

    Raises RunnerError.
    """
    if workers is not None and workers < 1:
        raise RunnerError(f"workers = {workers} must be at least 1")
    if address:
        _check_address(runner, address)
    count = workers or cores()
    match runner:
        case "process":
            return ProcessPoolTaskRunner(max_workers=count, initializer=end_with_parent)
        case "thread":
            return ThreadPoolTaskRunner(max_workers=count)
        case "dask":
            here = {"cluster_kwargs": {"n_workers": count, "threads_per_worker": 1}}
            kind = _extra("prefect_dask", runner).DaskTaskRunner
    cluster: TaskRunner[Any] = kind(**{"address": address} if address else here)
    return cluster


@flow(name="share-out", persist_result=False)
def share_out(corpus: str, *, workers: int | None) -> None:
    """Make everything of a corpus but what is published, by this flow's task runner; None asks it for its workers."""
    context = FlowRunContext.get()
    assert context is not None
    with no_child_outlives_an_error():
        stage.prepare(corpus, run=units_through(context.task_runner, workers=workers))


def units_through(pool: TaskRunner[Any], *, workers: int | None) -> stage.Runner:
    """A Runner for a flow whose task runner is `pool`: units in batches, each of them a Prefect task run.

    A batch that fails is tried again, unless only a person can fix it; the first error that stays ends the call.
    """

    def run(function: Callable[[Unit], None], units: list[Unit]) -> None:
        slots = workers or _slots(pool)
        count, phase = min(len(units), BATCHES * slots), units[0].phase
        get_run_logger().info("%s: %d units in %d task runs for %d workers", phase, len(units), count, slots)
        threads = max(1, cores() // slots) if workers else 1
        futures = [
            # Strided, because the units of one domain cost about the same.
            run_batch.with_options(task_run_name=f"{phase} {i + 1} of {count}").submit(
                function, units[i::count], threads=threads
            )
            for i in range(count)
        ]
        try:
            for future in as_completed(futures):
                future.result()
        except Exception as error:
            if type(error).__name__ in LOST:
                raise CorpusError(WORKER_KILLED) from None
            raise

    return run


def _may_pass(_task: object, _run: object, state: State[Any]) -> bool:
    """Whether a failed batch is worth another try: a full disk or a slow file system, not a faulty source."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, OSError) or not isinstance(error, (*stage.FAILURES, TrainingError))


@task(
    persist_result=False,
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=_may_pass,
)
def run_batch(function: Callable[[Unit], None], units: list[Unit], *, threads: int) -> None:
    """Run units one after another; those that are done cost next to nothing. `threads`: of the tokenizer."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # read once, when a process first tokenises
    for unit in units:
        function(unit)


@contextmanager
def reachable_server() -> Iterator[None]:
    """Let worker processes report to the Prefect server of this run; else each would start a temporary one."""
    url = get_current_settings().api.url
    if not url:
        from prefect.server.api.server import SubprocessASGIServer

        server = SubprocessASGIServer()  # the one that this process has
        server.start()
        url = server.api_url
    with default_environment({"PREFECT_API_URL": str(url)}):
        yield


@contextmanager
def no_child_outlives_an_error() -> Iterator[None]:
    """A unit can take minutes and may be killed at any point, so workers here aren't waited for after an error."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        raise


def _slots(pool: TaskRunner[Any]) -> int:
    """How many units a running Dask cluster runs at once."""
    threads: dict[str, int] = pool.client.nthreads()  # type: ignore[attr-defined]
    return max(1, sum(threads.values()))


def _check_address(runner: RunnerName, address: str) -> None:
    if runner in ("process", "thread"):
        raise RunnerError(f"address = {address!r} is of a cluster: set runner to dask, which is {runner!r}")
    url = get_current_settings().api.url
    if urlsplit(address).hostname and not environment.is_here(address) and (not url or environment.is_here(url)):
        raise RunnerError(
            f"workers at {address} cannot reach a Prefect server of this machine alone; start one for all (prefect "
            "server start --host 0.0.0.0) and set PREFECT_API_URL to an address that they can reach"
        )


def _extra(module: str, runner: RunnerName) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunnerError(f"runner {runner!r} needs {error.name}: pip install 'moeforge[{runner}]'") from None


if __name__ == "__main__":
    environment.connect()
    tokenise(corpus=sys.argv[1])
