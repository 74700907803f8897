"""Judging by tasks: a kill anywhere ends in the same files, and what fails for want of something is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks import settings
from tasks.evaluate.downstream import accuracy, collection, judging

TASKS = [settings.Task(name=name) for name in ("first", "second", "third")]
KNOBS = settings.Evaluate(seq_len=64, tasks=TASKS)
MODELS = ("dense", "trained")


class Killed(BaseException):
    """Stands for SIGKILL."""


def scored(model: str, task: str) -> dict[str, Any]:
    right = [float((ord(model[0]) + ord(task[0]) * i) % 3 == 0) for i in range(7)]
    scores = {"acc": sum(right) / 7, "acc_stderr": 0.1, "n": 7, "num_fewshot": 0}
    return {"scores": scores, "items": {"items": list("abcdefg"), "values": {"acc": right}}}


def run(folder: Path, patch: pytest.MonkeyPatch, *, die_at: int | None = None, lacking: str = "") -> str:
    """Judge two models, dying at a call of `accuracy.score`; what is written at the end, without times."""
    calls = 0

    def score(model: str, tokenizer: Any, task: settings.Task, **options: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls - 1 == die_at:
            raise Killed
        if model == "trained" and task.name == lacking:
            raise ModuleNotFoundError("No module named 'antlr4'\nsee the README")
        return scored(model, task.name)

    patch.setattr(accuracy, "score", score)
    judge = judging.Judge(tasks=TASKS, missing={}, items=object())  # type: ignore[arg-type]
    done = {
        model: judge.scores(lambda model=model: (model, None), keep=folder / model, batch=1, dtype="auto")  # type: ignore[misc]
        for model in MODELS
    }
    items = judging.by_item(done, missing=judge.missing)
    summary: dict[str, Any] = {model: {} for model in MODELS}
    judging.add(summary, done, items, knobs=KNOBS, missing=judge.missing)
    return json.dumps([items, summary])


@pytest.mark.parametrize("die_at", range(6))
def test_a_kill_in_any_task_ends_in_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: int
) -> None:
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    whole = run(folders[0], monkeypatch)
    with pytest.raises(Killed):
        run(folders[1], monkeypatch, die_at=die_at)
    assert len(list(folders[1].iterdir())) == die_at
    assert run(folders[1], monkeypatch) == whole


def test_a_task_that_fails_for_one_model_is_left_out_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items, summary = json.loads(run(tmp_path, monkeypatch, lacking="second"))
    assert list(items) == ["first", "third"]
    assert summary["missing"] == {"second": "ModuleNotFoundError: No module named 'antlr4'"}
    assert list(summary["dense"]["tasks"]) == ["first", "third"]
    assert list(summary["paired"]["tasks"]) == ["first", "third"]


def test_models_that_were_judged_by_different_items_are_not_compared() -> None:
    done = {model: {"first": scored(model, "first")} for model in MODELS}
    done["trained"]["first"]["items"]["items"] = list("abcdefx")
    with pytest.raises(ValueError, match="judged by different items of first"):
        judging.by_item(done, missing={})


def test_without_tasks_nothing_is_imported_and_nothing_missing(tmp_path: Path) -> None:
    judge = judging.gather([], tmp_path, versions={}, missing={})
    assert judge.items is None
    assert judge.scores(lambda: (None, None), keep=tmp_path / "dense", batch=1, dtype="auto") == {}
    assert judging.by_item({"dense": {}}, missing={}) == {}


def test_the_reason_of_a_failure_is_its_first_line() -> None:
    assert collection.reason(ValueError("one\ntwo")) == "ValueError: one"
    assert collection.reason(KeyError()) == "KeyError"
