"""One DVC stage = one Prefect task.

Each task runs `dvc --wait-for-lock repro --single-item STAGE`, so DVC alone decides what is up to date, and
Prefect's own cache is off. Stages with `meta.gpu` are called directly and so run one at a time in the main thread; the
others are submitted and run beside each other.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Completed

from flows import dag, domains, environment, progress
from flows.dag import Stage, StageError

RETRY_DELAYS = [3.0, 15.0]
"""Seconds before the first and every later retry."""

NOISE = (
    "To track the changes",
    "\tgit add",
    "To enable auto staging",
    "\tdvc config",
    "Use `dvc push`",
    "Updating lock",
    "Generating lock",
    "Setting accelerator to CPU",
)
"""What DVC says about git after every stage, and DeepSpeed at every import; it would bury the stage's own words."""

_running: set[subprocess.Popen[str]] = set()
_stopping = threading.Event()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a stage ended: `ran` is False if DVC had nothing to do, or took the result from its cache."""

    name: str
    ran: bool
    seconds: float


def run(stages: list[Stage], *, force: set[str] | None = None) -> list[Outcome]:
    """Run stages, given in graph order, inside a Prefect flow.

    Args:
        stages: what `dag.ancestors` gives.
        force: names of stages to run although DVC finds them up to date.

    Raises:
        GraphError, CodeError: dvc.yaml or a module cannot be read.
        StageError: a command failed. Stages that need it do not start; finished ones stay finished.
    """
    force = force or set()
    dag.refresh_code([stage.name for stage in stages])
    _stopping.clear()
    for stage in stages:
        progress.state(stage.name, "waiting")
    futures: dict[str, PrefectFuture[Any] | State[Any]] = {}
    with _nothing_outlives():
        for stage in stages:
            stage_task = run_stage.with_options(
                name=stage.name,
                task_run_name=stage.name,
                description=stage.desc,
                tags={"gpu"} if stage.gpu else set(),
                retries=stage.retries,
                retry_delay_seconds=RETRY_DELAYS[: stage.retries],
                retry_condition_fn=_may_retry,
            )
            wait_for = [futures[name] for name in stage.needs if name in futures]
            if stage.gpu:
                futures[stage.name] = stage_task(
                    stage, force=stage.name in force, wait_for=wait_for, return_state=True
                )
            else:
                futures[stage.name] = stage_task.submit(
                    stage, force=stage.name in force, wait_for=wait_for, return_state=False
                )
        for future in futures.values():
            if isinstance(future, PrefectFuture):
                future.wait()
        states = {name: f if isinstance(f, State) else f.state for name, f in futures.items()}
    for state in states.values():
        if state.is_failed() or state.is_crashed():
            state.result()  # raises what the stage raised
    return [state.result() for state in states.values()]


@task(persist_result=False, cache_policy=NO_CACHE)
def run_stage(stage: Stage, *, force: bool = False) -> State[Outcome]:
    """Run one stage if DVC or `force` asks for it, and record its metrics, or its domains, as a table."""
    if _stopping.is_set():
        raise StageError(f"{stage.name}: not started, because the run was stopped")
    log = get_run_logger()
    started = time.monotonic()
    reasons = ["forced"] if force else dag.changes([stage.name])[stage.name]
    ran = bool(reasons)
    if ran:
        log.info("%s: %s", stage.name, "; ".join(reasons))
        progress.state(stage.name, "running")
        try:
            ran = execute(stage, force=force, log=log.info)
        except BaseException:
            progress.state(stage.name, "failed")
            raise
    progress.state(stage.name, "done" if ran else "cached")
    if rows := domains.rows(stage.metrics) or metrics(stage):
        key = re.sub(r"[^a-z0-9]+", "-", stage.name.lower()).strip("-")
        create_table_artifact(key=key, table=rows, description=stage.desc)
    outcome = Outcome(name=stage.name, ran=ran, seconds=time.monotonic() - started)
    if ran:
        return Completed(data=outcome)
    return Completed(data=outcome, name="Cached", message="DVC has this result already")


def execute(stage: Stage, *, force: bool, log: Callable[[str], None]) -> bool:
    """Run a stage through DVC, its output line by line to `log`.

    Returns False if DVC took the result from its run cache. Raises StageError on failure or after `meta.timeout`.
    """
    dvc = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", *["--force"][:force], stage.name]
    runner = Path(__file__).with_name("child_process.py")
    tail: deque[str] = deque(maxlen=12)
    restored, late = False, threading.Event()
    with subprocess.Popen(
        [sys.executable, str(runner), *dvc],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment.variables(),
    ) as process:
        timer = _timer(process, minutes=stage.timeout, late=late)
        _running.add(process)
        try:
            for raw in process.stdout or ():
                text = raw.rstrip()
                if not text or any(noise in text for noise in NOISE):
                    continue
                tail.append(text)
                restored |= "is cached - skipping run" in text
                log(text)
                progress.line(stage.name, text)
        except BaseException:
            stop(process)
            raise
        finally:
            _running.discard(process)
            if timer:
                timer.cancel()
        code = process.wait()
    if late.is_set():
        raise StageError(f"{stage.name}: stopped after meta.timeout = {stage.timeout} minutes (dvc.yaml)")
    if code:
        said = "\n".join(f"    {line}" for line in tail)
        raise StageError(f"{stage.name}: `{stage.cmd}` failed (exit code {code}). Its last lines:\n{said}")
    return not restored


def metrics(stage: Stage) -> list[dict[str, Any]]:
    """The stage's metric files as rows {metric, value}; nested keys are joined by dots."""
    rows: list[dict[str, Any]] = []
    for path in stage.metrics:
        if path.exists():
            rows += [{"metric": key, "value": value} for key, value in _flat(json.loads(path.read_text()))]
    return rows


def stop(process: subprocess.Popen[str]) -> None:
    """End a stage's processes: child_process.py ends the whole tree when its standard input closes."""
    if process.stdin:
        process.stdin.close()
    process.wait()


@contextmanager
def _nothing_outlives() -> Iterator[None]:
    """On cancellation or Ctrl-C, which reach only the main thread, end the stages of the other threads too."""
    try:
        yield
    except BaseException:
        _stopping.set()
        for process in list(_running):
            stop(process)
        raise


def _may_retry(*_: object) -> bool:
    return not _stopping.is_set()


def _timer(process: subprocess.Popen[str], *, minutes: float | None, late: threading.Event) -> threading.Timer | None:
    if minutes is None:
        return None

    def expire() -> None:
        late.set()
        if process.stdin:
            process.stdin.close()

    timer = threading.Timer(minutes * 60, expire)
    timer.daemon = True
    timer.start()
    return timer


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, int | float | str | bool | None) else json.dumps(value)
