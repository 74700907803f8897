"""Runs in which a batch, or an expert, is bad: what the guard and the watch make of them, also across kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks import scratch, settings
from tasks.pretrain.job import Job
from tests.pretrain.projects import timeless

pytestmark = pytest.mark.e2e
POISONED = Path(__file__).with_name("poisoned_worker.py")


def job(project: Path, name: str, **changes: Any) -> Job:
    """The tiny pipeline's training as a job of its own."""
    params = settings.load(project / "pipelines.yaml").pipeline("tiny").pretrain
    workspace = Path(".scratch") / name
    workspace.mkdir(parents=True)
    return Job(
        pipeline="tiny",
        params=settings.Pretrain(**{**params.model_dump(), **changes}),
        corpus=Path("data/corpora/tiny"),
        model=Path("runs/tiny/moe"),
        parent=Path("data/models/tiny"),
        mixture=Path("runs/tiny/mixture.json"),
        workspace=workspace,
    )


def run(project: Path, made: Job, *poison: str) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": f"{project}{os.pathsep}{project / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(POISONED), str(made.write()), *poison],
        cwd=project, env={**os.environ, **paths}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def log(made: Job) -> list[dict[str, Any]]:
    return timeless(made.workspace / "training/log.jsonl")


def drawn(run: Path, step: int) -> tuple[str, int]:
    """Domain and window of a slot of a step's batch, which no batch before it has."""
    from tasks.tools import inspect_run as inspect

    slots = {n: [(s["domain"], s["window"]) for s in inspect.step(run, n)["slots"]] for n in range(1, step + 1)}
    before = {slot for n in range(1, step) for slot in slots[n]}
    return next(slot for slot in slots[step] if slot not in before)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_batch_without_a_finite_loss_is_left_out_and_named_and_a_run_killed_after_it_ends_the_same(
    project: Path, finished: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    monkeypatch.chdir(finished[0])
    domain, window = drawn(Path("runs/tiny"), 5)
    monkeypatch.chdir(project)
    poison = f"nan={domain}/{window}"
    guard = {"guard": {"policy": policy}, "save_every": 2}
    once, again = job(project, "once", **guard), job(project, "again", **guard)
    done = run(project, once, poison)
    assert done.returncode == 0, done.stderr
    events = [record for record in log(once) if record["kind"] == "event"]
    assert [event["what"] for event in events] == [policy]
    assert f"the loss is not finite at step 5 (windows: {domain} window {window})" in events[0]["message"]
    steps = [record["step"] for record in log(once) if record["kind"] == "step"]
    assert steps == [step for step in range(1, 13) if policy == "rollback" or step != 5]

    killed = run(project, again, poison, "die=5")  # rollback: step 5 was done again, and no checkpoint came after
    assert killed.returncode == -signal.SIGKILL
    done = run(project, again, poison)
    assert done.returncode == 0, done.stderr
    assert log(again) == log(once)
    assert scratch.digest(again.workspace / "trained") == scratch.digest(once.workspace / "trained")
    metrics = [json.loads((each.workspace / "pretrain.json").read_text()) for each in (once, again)]
    assert metrics[0]["resumed_from"] is None
    assert metrics[1]["resumed_from"]["step"] in (2, 4)  # the kill may come before the checkpoint of step 4 is whole


def test_a_spike_is_left_out_and_called_one(project: Path) -> None:
    made = job(project, "spiky", guard={"policy": "skip", "spike": 3.0})
    done = run(project, made, "spike=last/0")
    assert done.returncode == 0, done.stderr
    events = [record for record in log(made) if record["kind"] == "event"]
    assert [(event["what"], event["step"]) for event in events] == [("skip", 12)]
    assert "(pretrain.guard.spike) times its running mean" in events[0]["message"]


def test_a_run_that_keeps_failing_at_one_place_stops_with_what_was_tried(project: Path) -> None:
    made = job(project, "hopeless", guard={"policy": "skip", "limit": 2}, learning_rate=1e30)
    done = run(project, made)
    assert done.returncode != 0
    assert "2 of pretrain.guard.limit = 2 skips in a row are used up" in done.stderr


def test_a_starved_expert_is_named_with_its_layer_once(project: Path) -> None:
    made = job(project, "starved", balance={"loss": "bias", "coefficient": 0.0}, expert_log="detailed")
    done = run(project, made, "dead=1/3")
    assert done.returncode == 0, done.stderr
    dead = [record for record in log(made) if record["kind"] == "event" and record["what"] == "dead_experts"]
    assert [(event["layer"], event["experts"]) for event in dead] == [(1, [3])]
    assert "layer 1" in dead[0]["message"]
    loads = [record["experts"] for record in log(made) if record["kind"] == "step"]
    assert all(load["tokens"][1][3] == 0 and load["dead"] >= 1 for load in loads)
