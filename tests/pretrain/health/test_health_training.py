"""Runs in which batches and an expert are bad: what the guard and the monitor do, also across kill -9."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tasks import scratch, settings
from tasks.pretrain.job import Job
from tests.pretrain.health import poisoned_worker
from tests.pretrain.projects import timeless
from tests.warm_processes import Ended, run

pytestmark = pytest.mark.e2e


def job(name: str, **changes: Any) -> Job:
    """The tiny pipeline's training as a job of its own, in the project that is the working directory."""
    params = settings.load(Path("pipelines.yaml")).pipeline("tiny").pretrain
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


def train(made: Job, *poison: str) -> Ended:
    return run(poisoned_worker.main, str(made.write()), *poison)


def log(made: Job, kind: str) -> list[dict[str, Any]]:
    return [record for record in timeless(made.workspace / "training/log.jsonl") if record["kind"] == kind]


def drawn(folder: Path, step: int) -> tuple[str, int]:
    """Domain and window of a slot of a step's batch, which no batch before it has."""
    from tasks.tools import inspect_run as inspect

    slots = {n: [(s["domain"], s["window"]) for s in inspect.step(folder, n)["slots"]] for n in range(1, step + 1)}
    before = {slot for n in range(1, step) for slot in slots[n]}
    return next(slot for slot in slots[step] if slot not in before)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_bad_batches_and_a_starved_expert_are_named_and_a_run_killed_after_a_bad_batch_ends_the_same(
    project: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    monkeypatch.chdir(finished)
    domain, window = drawn(Path("runs/tiny"), 5)
    monkeypatch.chdir(project)
    poison = [f"nan={domain}/{window}", "dead=1/3", *(["spike=step/12"] if policy == "skip" else [])]
    changes = {
        "guard": {"policy": policy, "spike": 3.0}, "save_every": 2, "expert_log": "detailed",
        "balance": {"loss": "bias", "coefficient": 0.0},
    }  # fmt: skip
    once, again = job("once", **changes), job("again", **changes)
    done = train(once, *poison)
    assert done.returncode == 0, done.stderr
    bad, *others = [event for event in log(once, "event") if event["what"] in ("skip", "rollback")]
    assert bad["what"] == policy
    assert f"the loss is not finite at step 5 (windows: {domain} window {window})" in bad["message"]
    assert [(event["what"], event["step"]) for event in others] == ([("skip", 12)] if policy == "skip" else [])
    assert all("(pretrain.guard.spike) times its running mean" in event["message"] for event in others)
    left_out = {5, 12} if policy == "skip" else set()
    assert [record["step"] for record in log(once, "step")] == [n for n in range(1, 13) if n not in left_out]
    (dead,) = [event for event in log(once, "event") if event["what"] == "dead_experts"]
    assert (dead["layer"], dead["experts"]) == (1, [3])
    assert "layer 1" in dead["message"]
    loads = [record["experts"] for record in log(once, "step")]
    assert all(load["tokens"][1][3] == 0 and load["dead"] >= 1 for load in loads)

    killed = train(again, *poison, "die=5")  # rollback: step 5 was done again, and no checkpoint came after
    assert killed.returncode == -signal.SIGKILL
    done = train(again, *poison)
    assert done.returncode == 0, done.stderr
    assert [log(again, kind) for kind in ("step", "event", "validation")] == [
        log(once, kind) for kind in ("step", "event", "validation")
    ]
    assert scratch.digest(again.workspace / "trained") == scratch.digest(once.workspace / "trained")
    metrics = [json.loads((each.workspace / "pretrain.json").read_text()) for each in (once, again)]
    assert metrics[0]["resumed_from"] is None
    assert metrics[1]["resumed_from"]["step"] in (2, 4)  # the kill may come before the checkpoint of step 4 is whole
