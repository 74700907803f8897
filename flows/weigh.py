"""Train the proxies of a pipeline's swarm on many machines, by one of Prefect's task runners, before its estimate.

    moeforge weigh NAME --workers 8                                       # processes on this machine
    moeforge weigh NAME --runner dask --address tcp://node1:8786          # a Dask cluster on a shared file system
    python -m flows.weigh NAME                                            # the same flow, with Prefect's log

Finished units lie in runs/NAME/swarm, so the stage `mixture` finds them there; `dvc repro` and this flow leave the
same dvc.lock.
"""

from __future__ import annotations

import sys

from prefect import flow
from prefect.context import FlowRunContext

from flows import dag, environment, stages
from flows.stages import Outcome
from flows.tokenise import (
    RunnerName,
    no_child_outlives_an_error,
    reachable_server,
    task_runner,
    units_through,
)
from tasks import settings
from tasks.mixture import __main__ as mixture
from tasks.workers import cores, default_environment


@flow(name="weigh", persist_result=False)
def weigh(
    pipeline: str = "demo", runner: RunnerName = "process", workers: int | None = None, address: str | None = None
) -> list[Outcome]:
    """Run what is out of date up to a pipeline's domain weights, the units of its swarm shared out over workers.

    Args:
        pipeline: its name in pipelines.yaml; its method has a swarm, or there is nothing to share out.
        runner: what trains the units: processes or threads of this machine, a Dask cluster.
        workers: how many train at once; by default one for each core here, or as many as the cluster has.
        address: of a running Dask scheduler; without it a cluster is started on this machine.

    Raises:
        SettingsError, RunnerError, StageError: as `tokenise` does.
        ValueError, TrainingError, OSError: a unit cannot be trained. What was finished is kept for the next run.
    """
    entry = settings.load().pipeline(pipeline)
    pool = task_runner(runner, workers=workers, address=address)
    *before, last = dag.ancestors(f"mixture@{pipeline}")
    outcomes = stages.run(before)
    if entry.mixture.swarm and dag.changes([last.name])[last.name]:
        slots = None if address else workers or cores()
        with reachable_server():
            share_out.with_options(task_runner=pool)(pipeline, workers=slots)
    return outcomes + stages.run([last])


@flow(name="share-out-units", persist_result=False)
def share_out(pipeline: str, *, workers: int | None) -> None:
    """Train every unit of a pipeline's swarm by this flow's task runner; None asks it for its workers."""
    context = FlowRunContext.get()
    assert context is not None
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // workers))} if workers else {}
    with no_child_outlives_an_error(), default_environment(threads):
        mixture.share(pipeline, run=units_through(context.task_runner, workers=workers))


if __name__ == "__main__":
    environment.connect()
    weigh(pipeline=sys.argv[1])
