"""`moeforge`: run, tokenise, weigh, plan, inspect, evaluate, export, doctor, … Commands import what they need."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from flows import costs, dag, environment, evaluate, export, sharing
from flows.terminal import clear_errors, fail, raise_on_sigterm, show
from tasks import plugin, scratch, settings

app = typer.Typer(
    name="moeforge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn a dense LLaMA into a sparse Mixture-of-Experts, heal it, and see in numbers what was kept.",
    epilog="Run it from the project's root, where pipelines.yaml lies. Start with: moeforge run demo",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A pipeline of pipelines.yaml.")]


@app.command(epilog="Example: moeforge run demo --force pretrain")
def run(
    name: Name,
    refresh: Annotated[bool, typer.Option("--refresh", help="Read the corpus sources again.")] = False,
    force: Annotated[
        list[str] | None,
        typer.Option("--force", metavar="STAGE", help="Run a stage again; may be given several times."),
    ] = None,
) -> None:
    """Run what is out of date of a pipeline, and print the results.

    Stopped or killed, it goes on from where it was when run again. If everything is up to date, Prefect is not
    started.
    """
    environment.prepare()
    raise_on_sigterm()
    started = time.monotonic()
    with clear_errors():
        stages, up_to_date = _check_before(name, force or [])
        up_to_date = up_to_date and not refresh and not force
        if not up_to_date:
            from flows import progress

            with progress.display():
                for stage in stages:
                    progress.state(stage, "waiting")  # something to look at while Prefect starts
                environment.connect()
                from flows import upcycle

                outcomes = upcycle.upcycle(pipeline=name, refresh=refresh, force=force)
            up_to_date = not any(outcome.ran for outcome in outcomes)
        from tasks.evaluate import summary

        show(summary.table(name))
        print(f"report: {dag.report_page(name).resolve()}")
        took = time.monotonic() - started
        print(f"{name}: " + (f"everything is up to date ({took:.1f} s)" if up_to_date else f"done in {took:.0f} s"))


def _check_before(name: str, force: list[str]) -> tuple[list[str], bool]:
    """Validate all that can be without Prefect. Returns the stages, and whether DVC finds all of them up to date."""
    from flows import preflight

    config = settings.load()
    config.pipeline(name)
    with scratch.workspace("run", name):
        stages = dag.ancestors(dag.last_stage(name))
        dag.resolve(force, stages=stages)
        names = [stage.name for stage in stages]
        dag.refresh_code(names)
        is_due = any(dag.changes(names).values())
        if is_due:
            preflight.require(config, name)
            for line in preflight.warnings(config, name):
                print(f"warning: {line}", file=sys.stderr)
        return names, not is_due


@app.command(epilog="Examples: moeforge plan demo; moeforge plan recipes/llama-2-7b-random-4of16.yaml --tflops 312")
def plan(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A pipeline, or a recipe file.")],
    file: Annotated[Path | None, typer.Option("--file", help="Read the pipeline from this file.")] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops", min=0.001, help="Matrix-product speed of one process in TFLOP/s, else measured here."
        ),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Run a few training steps here with random weights, and measure them.")
    ] = False,
) -> None:
    """Show what would run and why, and what it costs: parameters, FLOPs, memory, disk, time. Downloads nothing."""
    environment.prepare()
    from flows import plan_view, preflight

    if calibrate and tflops is not None:
        fail("--calibrate measures this machine, and --tflops is for another; leave one out")
    with clear_errors():
        is_recipe = file is None and name.endswith((".yaml", ".yml"))
        file = Path(name) if is_recipe else file
        config = settings.load(file or settings.FILE)
        for each in list(config.pipelines) if is_recipe else [name]:
            if file is None:
                show(plan_view.stages(each))
            for line in preflight.refusals(config, each):
                print(f"would be refused: {line}")
            for table in plan_view.figures(config, each, tflops=tflops, calibrated=calibrate):
                show(table)


@app.command(epilog="Example: moeforge status")
def status() -> None:
    """Show every pipeline: what is out of date, its last result, and whether it is being run."""
    environment.prepare()
    from flows import plan_view

    with clear_errors():
        show(plan_view.status(settings.load()))


@app.command(
    epilog="Examples: moeforge inspect data/corpora/demo; moeforge inspect runs/demo/trained; "
    "moeforge inspect runs/demo --step 7"
)
def inspect(
    path: Annotated[Path, typer.Argument(help="A shard, corpus, mixture, partition or checkpoint; a run for --step.")],
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="Show the documents that step N of a run saw.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="With --step: whole texts and ids, not beginnings.")] = False,
) -> None:
    """Show what is in a file or folder of the pipeline: counts, decoded text, where it comes from."""
    from flows import artifacts

    with clear_errors():
        if full and step is None:
            fail("--full goes with --step N")
        content = artifacts.inspect(path) if step is None else artifacts.inspect_step(path, step, full=full)
        print(json.dumps(content, indent=2, ensure_ascii=False))


@app.command(epilog="Examples: moeforge verify data/corpora/demo; moeforge verify runs/demo/moe")
def verify(path: Annotated[Path, typer.Argument(help="A corpus, or a pipeline's converted checkpoint.")]) -> None:
    """Check a corpus (hashes, counts, ids in the vocabulary) or a checkpoint (identity test). Exit 1 if not sound."""
    from flows import artifacts

    with clear_errors():
        _report(path, artifacts.verify(path))


@app.command(epilog="Example: moeforge repair data/corpora/demo")
def repair(path: Annotated[Path, typer.Argument(help="A corpus.")]) -> None:
    """Make broken shards and sidecars of a corpus again, byte for byte. Exit 1 if something is wrong still."""
    from flows import artifacts

    with clear_errors():
        _report(path, artifacts.repair(path))


def _report(path: Path, problems: list[str]) -> None:
    for problem in problems:
        print(problem)
    if problems:
        fail(f"{path}: {len(problems)} problem{'s'[: len(problems) > 1]}")
    print(f"{path}: sound")


@app.command(epilog="Example: moeforge release demo")
def release(name: Name) -> None:
    """Ship the present result, whatever its figures, as runs/NAME/release. `retrain` ships only what is not worse."""
    with _released(name) as releases:
        print(f"{name}: runs/{name}/release is now {releases.by_hand(name)}")


@app.command(epilog="Examples: moeforge rollback demo; moeforge rollback demo 1f0c2a9be77d")
def rollback(
    name: Name,
    release: Annotated[str | None, typer.Argument(metavar="RELEASE", help="One that is kept, else the last.")] = None,
) -> None:
    """Ship the release before the present one again, or the one named."""
    with _released(name) as releases:
        old, new = releases.rollback(name, release)
        print(f"{name}: runs/{name}/release is now releases/{new}, before it was releases/{old}")
        print(f"commit runs/{name}/accepted.json: retraining compares with the model that it names")


@contextmanager
def _released(name: str) -> Iterator[Any]:
    """flows/releases.py while nothing else runs the pipeline."""
    from flows import releases

    with clear_errors():
        settings.load().pipeline(name)
        with scratch.workspace("run", name):
            if problem := releases.settle(name):
                print(problem, file=sys.stderr)
            yield releases


app.command(
    epilog="Examples: moeforge tokenise demo --workers 8; "
    "moeforge tokenise demo --runner dask --address tcp://node1:8786"
)(sharing.tokenise)
app.command(
    epilog="Examples: moeforge weigh NAME --workers 8; moeforge weigh NAME --runner dask --address tcp://node1:8786"
)(sharing.weigh)
app.command(epilog="Example: moeforge evaluate demo --against data/models/NAME --corpus demo")(evaluate.evaluate)
app.command(epilog="Examples: moeforge flops demo; moeforge flops runs/demo/trained --seq-len 4096")(costs.flops)
app.command(epilog="Example: moeforge speedup runs/demo --against runs/demo/control")(costs.speedup)
app.command(epilog="Example: moeforge export demo --gguf --quantise Q8_0")(export.export)


@app.command(epilog="Example: moeforge doctor")
def doctor() -> None:
    """Check that this machine is fit, and say how to fix what is missing. Exit 1 if something needed is missing."""
    environment.prepare()
    from flows import doctor as checks

    with clear_errors():
        results = checks.examine()
        show(checks.table(results))
        if any(check.needed and not check.ok for check in results):
            raise typer.Exit(1)


def _with_clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A plug-in's command, whose errors end as those of the core's commands do."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        with clear_errors():
            try:
                command(**arguments)
            except (ValueError, FileExistsError) as error:
                fail(str(error))

    return run


for _module in plugin.modules("commands").values():
    for _name, (_command, _example) in _module.COMMANDS.items():
        app.command(_name, epilog=f"Example: {_example}")(_with_clear_errors(_command))


if __name__ == "__main__":
    app()
