"""`moeforge tokenise` and `moeforge weigh`: work that is cut into units, on many processes or machines."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import typer

from flows import dag, environment
from flows.terminal import clear_errors, raise_on_sigterm, show
from tasks import settings

RunnerOption = Annotated[
    Literal["process", "thread", "dask"],
    typer.Option("--runner", help="What does the work: processes or threads here, or a cluster."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="How many at once (default: one for each core, or all of the cluster)."),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Of a running Dask scheduler, else one starts here."),
]


def tokenise(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A corpus of pipelines.yaml.")],
    runner: RunnerOption = "process",
    workers: WorkersOption = None,
    address: AddressOption = None,
) -> None:
    """Tokenise a corpus on many processes or machines, and what it needs before.

    Stopped or killed, it goes on from where it was, with any other runner too. On a cluster, all machines share the
    project's folder, and the workers run in it.
    """
    environment.prepare()
    raise_on_sigterm()
    started = time.monotonic()
    with clear_errors():
        settings.load().corpus(name)
        from flows import domains, progress
        from flows import tokenise as flow

        flow.task_runner(runner, workers=workers, address=address)  # refused before Prefect starts
        if any(dag.changes([each.name for each in dag.ancestors(f"corpus@{name}")]).values()):
            environment.connect()
            with progress.display(terminal=False):  # the corpus has a live display of its own
                flow.tokenise(corpus=name, runner=runner, workers=workers, address=address)
        show(domains.table(name))
        print(f"{name}: done in {time.monotonic() - started:.0f} s")


def weigh(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A pipeline of pipelines.yaml.")],
    runner: RunnerOption = "process",
    workers: WorkersOption = None,
    address: AddressOption = None,
) -> None:
    """Estimate the domain weights of a pipeline, its proxies trained by many processes or machines.

    Stopped or killed, it goes on from where it was, with any other runner too.
    """
    environment.prepare()
    raise_on_sigterm()
    started = time.monotonic()
    with clear_errors():
        settings.load().pipeline(name)
        from flows import tokenise
        from flows import weigh as flow

        tokenise.task_runner(runner, workers=workers, address=address)  # refused before Prefect starts
        if any(dag.changes([each.name for each in dag.ancestors(f"mixture@{name}")]).values()):
            environment.connect()
            flow.weigh(pipeline=name, runner=runner, workers=workers, address=address)
        print(f"{name}: weights in runs/{name}/mixture.json after {time.monotonic() - started:.0f} s")
