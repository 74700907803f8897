"""Which changed settings a start takes over, and which it refuses."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import scratch
from tasks.pretrain import schedule
from tasks.pretrain.checkpoints import resume
from tasks.pretrain.job import JOB, Job, TrainingError
from tasks.settings import Pretrain

BASE: dict[str, Any] = {
    "tokens": 64 * 100, "seq_len": 16, "batch": 4, "learning_rate": 1e-3, "warmup_tokens": 64 * 10, "schedule": "wsd",
}  # fmt: skip
INPUTS = {"model": "a", "mixture": "b", "corpus": "c"}


def settings(**fields: Any) -> Pretrain:
    return Pretrain(**BASE | fields)


def state(step: int = 20, **fields: Any) -> dict[str, Any]:
    return {"step": step, "params": settings(**fields).model_dump(mode="json")}


def unfinished(folder: Path, *, step: int = 20, **fields: Any) -> None:
    """A whole checkpoint without tensors."""
    saved = {**state(step, **fields), "files": {}}
    scratch.write_sealed(folder / f"checkpoints/step-{step:08}/state.json", saved)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resume.job, "code_digest", lambda: "this")
    return tmp_path


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("processes", 2, "pretrain.processes: 1 -> 2"),
        ("micro_batch", 2, "pretrain.micro_batch: 1 -> 2"),
        ("launcher", "slurm", 'pretrain.launcher: "local" -> "slurm"'),
        ("save_every", 7, "pretrain.save_every: 50 -> 7"),
        ("keep", 5, "pretrain.keep: 2 -> 5"),
        ("keep_every", 10, "pretrain.keep_every: absent -> 10"),
        ("trackers", [], 'pretrain.trackers: ["tensorboard"] -> []'),
        ("expert_log", "detailed", 'pretrain.expert_log: "brief" -> "detailed"'),
        ("guard", {"policy": "skip"}, 'pretrain.guard.policy: "stop" -> "skip"'),
        ("gradient_checkpointing", True, "pretrain.gradient_checkpointing: false -> true"),
        ("offload", True, "pretrain.offload: false -> true"),
        ("precision", "float32", 'pretrain.precision: "auto" -> "float32"'),
        ("eval_tokens", 640, "pretrain.eval_tokens: 1048576 -> 640"),
        ("tokens", 64 * 200, "pretrain.tokens: 6400 -> 12800"),
        ("decay_share", 0.5, "pretrain.decay_share: 0.2 -> 0.5"),
        ("final_lr_share", 0.0, "pretrain.final_lr_share: 0.1 -> 0.0"),
    ],
)
def test_a_safe_change_is_taken_over_and_named(field: str, value: Any, shown: str) -> None:
    (change,) = resume.admit(state(), settings(**{field: value}), pipeline="p")
    assert str(change) == shown


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("learning_rate", 2e-3, "pretrain.learning_rate: 0.001 -> 0.002"),
        ("learning_rates", {"router": 1e-2}, "pretrain.learning_rates.router: absent -> 0.01"),
        ("seed", 1, "pretrain.seed: 0 -> 1"),
        ("batch", 8, "pretrain.batch: 4 -> 8"),
        ("zero_stage", 3, "pretrain.zero_stage: 1 -> 3"),
        ("balance", {"loss": "bias"}, 'pretrain.balance.loss: "switch" -> "bias"'),
        ("distill", {"logits": 2.0}, "pretrain.distill.logits: absent -> 2.0"),
        ("train", "router", 'pretrain.train: "all" -> "router"'),
        ("eval_windows", 4, "pretrain.eval_windows: 2 -> 4"),
        ("warmup_tokens", 64 * 40, "pretrain.warmup_tokens: 640 -> 2560"),
        ("schedule", "cosine", 'pretrain.schedule: "wsd" -> "cosine"'),
        ("decay_share", 0.85, "pretrain.decay_share: 0.2 -> 0.85"),
        ("tokens", 64 * 20, "pretrain.tokens: 6400 -> 1280"),
    ],
)
def test_any_other_change_is_refused_with_what_it_was_and_both_ways_on(field: str, value: Any, shown: str) -> None:
    with pytest.raises(TrainingError) as refused:
        resume.admit(state(), settings(**{field: value, "keep": 3}), pipeline="p")
    message = str(refused.value)
    assert shown in message
    assert "keep" not in message
    assert "step 20" in message
    assert "set them back" in message
    assert "python -m tasks.pretrain p --discard" in message


def test_evaluations_that_move_the_weights_stay_as_they_are() -> None:
    with pytest.raises(TrainingError, match="eval_tokens"):
        resume.admit(state(dynamic={}), settings(dynamic={}, eval_tokens=640), pipeline="p")


def test_after_its_last_step_a_run_is_not_made_longer() -> None:
    constant = {"schedule": "constant", "warmup_tokens": 0}
    for step, admitted in ((99, True), (100, False)):
        saved = state(step, **constant)
        with contextlib.nullcontext() if admitted else pytest.raises(TrainingError, match="tokens: 6400 -> 12800"):
            resume.admit(saved, settings(tokens=12800, **constant), pipeline="p")


@given(
    step=st.integers(1, 99),
    old=st.tuples(st.sampled_from(["cosine", "wsd", "linear", "constant"]), st.integers(0, 99), st.integers(100, 300)),
    new=st.tuples(st.sampled_from(["cosine", "wsd", "linear", "constant"]), st.integers(0, 99), st.integers(100, 300)),
    decay=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_the_course_may_change_exactly_where_the_steps_so_far_had_the_same_rates(
    step: int, old: tuple[Any, ...], new: tuple[Any, ...], decay: tuple[float, float]
) -> None:
    before, after = (
        settings(schedule=kind, warmup_tokens=64 * warmup, tokens=64 * steps, decay_share=share)
        for (kind, warmup, steps), share in zip((old, new), decay, strict=True)
    )
    same = all(schedule.share(at, before) == schedule.share(at, after) for at in range(1, step + 1))
    try:
        resume.admit({"step": step, "params": before.model_dump(mode="json")}, after, pipeline="p")
        admitted = True
    except TrainingError:
        admitted = False
    assert admitted == (same or before == after)


def test_settings_that_this_code_does_not_know_are_refused_and_not_a_crash(tmp_path: Path) -> None:
    for params, field in [({**BASE, "balance_loss": 0.01}, "balance_loss"), ({"seq_len": 16}, "tokens")]:
        with pytest.raises(TrainingError, match=rf"by code with other settings.*{field}: .*--discard"):
            resume.admit({"step": 4, "params": params}, settings(), pipeline="p")
    with pytest.raises(TrainingError, match="params is missing"):
        resume.admit({"step": 4}, settings(), pipeline="p")
    scratch.write_json(tmp_path / JOB, {"pipeline": "p", "params": {**BASE, "balance_loss": 0.01}})
    with pytest.raises(TrainingError, match=f"{JOB} was written by code with other settings"):
        Job.read(tmp_path / JOB)


def test_work_from_the_same_inputs_is_found_whatever_the_settings_and_says_what_changed() -> None:
    with resume.workspace("p", params=settings(), inputs=INPUTS) as (folder, notes):
        assert not notes
        unfinished(folder)
    with resume.workspace("p", params=settings(keep=4, processes=2), inputs=INPUTS) as (again, notes):
        assert again == folder
        assert notes == [
            "going on from step 20 with pretrain.processes: 1 -> 2",
            "going on from step 20 with pretrain.keep: 2 -> 4",
        ]
    with (
        pytest.raises(TrainingError, match="seed: 0 -> 1"),
        resume.workspace("p", params=settings(seed=1), inputs=INPUTS),
    ):
        pass
    assert (folder / "checkpoints/step-00000020").exists()  # refused, and kept


def test_a_run_without_a_checkpoint_takes_any_settings() -> None:
    with resume.workspace("p", params=settings(), inputs=INPUTS):
        pass
    with resume.workspace("p", params=settings(seed=1, zero_stage=3), inputs=INPUTS) as (_, notes):
        assert not notes


def finish(folder: Path) -> None:
    shutil.rmtree(folder)  # as outputs.publish does


def test_unfinished_work_is_kept_aside_for_other_inputs_and_found_again_with_its_own() -> None:
    others = INPUTS | {"mixture": "d"}
    with resume.workspace("p", params=settings(), inputs=INPUTS) as (folder, _):
        unfinished(folder)
    for _ in range(2):  # killed, and started again
        with resume.workspace("p", params=settings(seed=1), inputs=others) as (other, (note, start)):
            assert other != folder
            assert f"the mixture changed since step 20 of an unfinished run, which is kept in {folder} " in note
            assert start == "starting anew"
    with resume.workspace("p", params=settings(), inputs=INPUTS) as (again, notes):
        assert (again, notes) == (folder, [])
        assert resume.unfinished("p") == {folder: 20}
    with resume.workspace("p", params=settings(seed=1), inputs=others) as (other, _):
        unfinished(other, step=10, seed=1)
    with resume.workspace("p", params=settings(), inputs=INPUTS) as (_, (note,)):
        assert "the mixture changed since step 10" in note
        finish(folder)
    assert not other.exists()
    assert not resume.unfinished("p")


@pytest.mark.parametrize("steps", [(20, 10), (10, 20)])
def test_of_runs_with_other_inputs_the_longest_is_kept_and_the_other_told(steps: tuple[int, int]) -> None:
    folders = {}
    for corpus, step in zip("de", steps, strict=True):
        with resume.workspace("p", params=settings(), inputs=INPUTS | {"corpus": corpus}) as (folders[step], _):
            unfinished(folders[step], step=step)
    with resume.workspace("p", params=settings(), inputs=INPUTS) as (_, notes):
        assert folders[20].exists()
        assert not folders[10].exists()
        assert sorted("which was deleted" in note for note in notes) == [False, False, True]
        assert any("step 10 of an unfinished run, which was deleted" in note for note in notes)


@pytest.mark.parametrize("pointer", [None, "", "{", "[]"])
def test_discarding_needs_no_pointer_and_takes_what_was_kept_aside(pointer: str | None) -> None:
    for corpus in "cd":
        with resume.workspace("p", params=settings(), inputs=INPUTS | {"corpus": corpus}) as (folder, _):
            unfinished(folder)
            if pointer is not None:
                (folder / "checkpoints/latest.json").write_text(pointer)
    assert len(resume.unfinished("p")) == 2
    assert resume.discard("p") == "deleted the unfinished training of p up to step 20"
    assert not resume.unfinished("p")
    assert not list((scratch.ROOT / "pretrain-p").glob("*/"))


def test_discarding_deletes_the_unfinished_work_of_this_pipeline_alone() -> None:
    folders = {}
    for name in ("p", "q"):
        with resume.workspace(name, params=settings(), inputs=INPUTS) as (folders[name], _):
            unfinished(folders[name])
    with resume.workspace("p", params=settings(), inputs=INPUTS), pytest.raises(scratch.BusyError):
        resume.discard("p")
    assert resume.discard("p") == "deleted the unfinished training of p up to step 20"
    assert [folders["p"].exists(), folders["q"].exists()] == [False, True]
    assert resume.discard("p") == "p has no unfinished training"
    with resume.workspace("p", params=settings(seed=1), inputs=INPUTS) as (_, notes):
        assert not notes
