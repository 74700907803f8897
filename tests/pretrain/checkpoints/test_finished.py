"""What is kept of a finished run, and where later runs begin from it: checkpoints without tensors."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tasks import scratch
from tasks.pretrain import job, schedule
from tasks.pretrain.checkpoints import branch, finished, resume, store
from tasks.pretrain.job import Job, TrainingError
from tasks.settings import Pretrain

INPUTS = {"model": "a", "mixture": "b", "corpus": "c"}
STEPS = 100


def settings(**fields: Any) -> Pretrain:
    given = {"tokens": 64 * STEPS, "seq_len": 16, "batch": 4, "learning_rate": 1e-3, "warmup_tokens": 640}
    return Pretrain(**given | {"schedule": "wsd", "keep_finished": True} | fields)


def entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def lines(steps: int) -> bytes:
    return b"".join(b"step %d\n" % step for step in range(1, steps + 1))


def save(workspace: Path, step: int, params: Pretrain) -> None:
    path = workspace / "checkpoints" / store.tag(step)
    path.mkdir(parents=True)
    content = b"weights of %d" % step
    (path / "weights.pt").write_bytes(content)
    state = {"step": step, "params": params.model_dump(mode="json"), "log": entry(lines(step))}
    scratch.write_sealed(path / "state.json", {**state, "files": {"weights.pt": entry(content)}})
    (workspace / "training").mkdir(exist_ok=True)
    (workspace / "training/log.jsonl").write_bytes(lines(step))


def train(
    pipeline: str, params: Pretrain, *steps: int, inputs: dict[str, str] = INPUTS, end: bool = True
) -> list[str]:
    """A run that saves at these steps; returns what it said at its start."""
    with resume.workspace(pipeline, params=params, inputs=inputs) as (folder, notes):
        for step in steps:
            save(folder, step, params)
        (folder / "training").mkdir(exist_ok=True)
        (folder / "training/tensorboard").mkdir(exist_ok=True)
        if end:
            paths = dict.fromkeys(("corpus", "model", "parent", "mixture"), Path())
            finished.keep(Job(pipeline=pipeline, params=params, workspace=folder, **paths))
    return notes


def begun(pipeline: str) -> tuple[list[int], bytes]:
    """Steps and log of an unfinished run."""
    (folder,) = resume.unfinished(pipeline)
    return store.steps(folder / "checkpoints"), (folder / "training/log.jsonl").read_bytes()


def kept(pipeline: str) -> list[int]:
    folder = finished.folder(pipeline)
    return store.steps(folder / "checkpoints") if folder else []


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "code_digest", lambda: "this")


@given(
    kind=st.sampled_from(["cosine", "wsd", "linear", "constant"]),
    steps=st.integers(2, 300),
    longer=st.integers(1, 300),
    share=st.floats(0.01, 1),
    warmup=st.integers(0, 50),
)
def test_a_longer_run_is_the_same_up_to_the_stable_step(
    kind: Any, steps: int, longer: int, share: float, warmup: int
) -> None:
    warmup = min(warmup, steps - 1)
    fields = {"schedule": kind, "decay_share": share, "warmup_tokens": 64 * warmup}
    short, long = (settings(tokens=64 * count, **fields) for count in (steps, steps + longer))
    last = schedule.stable(short)
    if last is None:
        assert kind in {"cosine", "linear"} or warmup == 0
        return
    assert 0 < last < steps
    assert all(schedule.share(step, short) == schedule.share(step, long) for step in range(1, last + 1))


def test_a_finished_run_leaves_nothing_unless_the_settings_keep_it() -> None:
    train("p", settings(), 90, 100)
    assert kept("p")[-1] == 100
    train("p", settings(keep_finished=False))
    assert not [path for path in scratch.ROOT.glob("*-p/*") if path.name != "lock"], kept("p")


def test_a_finished_run_leaves_its_last_step_and_the_last_before_its_decay() -> None:
    train("p", settings(), 70, 80, 90, 100)
    assert kept("p") == [80, 100]
    folder = finished.folder("p")
    assert folder is not None
    assert [path.name for path in (folder / "training").iterdir()] == ["log.jsonl"]
    assert not list((scratch.ROOT / "pretrain-p").glob("*/"))


@pytest.mark.parametrize(
    ("change", "step", "said"),
    [
        ({}, 100, "published again"),
        ({"trackers": [], "keep": 5, "save_every": 7, "processes": 2}, 100, "published again"),
        ({"tokens": 64 * STEPS - 1}, 100, "published again"),
        ({"tokens": 64 * 200}, 80, "with 120 steps to train"),
        ({"decay_share": 0.1}, 80, "with 20 steps to train"),
        ({"final_lr_share": 0.0, "trackers": ["wandb"]}, 80, "with 20 steps to train"),
    ],
)
def test_a_later_run_goes_on_from_the_last_step_that_it_shares(change: dict[str, Any], step: int, said: str) -> None:
    train("p", settings(), 80, 100)
    notes = train("p", settings(**change), end=False)
    assert f"going on from step {step} of the finished run" in notes[0]
    assert branch.outlook("p", settings(**change)) == step
    assert branch.kept_bytes("p") < 2 * sum(path.stat().st_size for path in Path(".scratch").rglob("*.*"))
    assert said in notes[0]
    assert begun("p") == ([at for at in (80, 100) if at <= step], lines(step))
    assert kept("p") == [80, 100]  # until this one is finished
    notes = train("p", settings(**change), end=False)  # killed, and started again
    assert "starting anew" not in str(notes)
    train("p", settings(**change))
    assert kept("p") == [at for at in (80, 100) if at <= step]  # what is published again can be made longer still


def test_a_constant_rate_goes_on_from_the_step_before_the_last() -> None:
    params = settings(schedule="constant")
    train("p", params, 99, 100)
    train("p", settings(schedule="constant", tokens=64 * 150), end=False)
    assert begun("p")[0] == [99]


@pytest.mark.parametrize(
    ("params", "inputs", "said"),
    [
        (
            {"learning_rate": 1.0},
            INPUTS,
            "not the one that these settings give (pretrain.learning_rate: 0.001 -> 1.0)",
        ),
        ({"tokens": 64 * 50}, INPUTS, "not the one that these settings give (pretrain.tokens: 6400 -> 3200)"),
        ({}, INPUTS | {"mixture": "z"}, "the mixture changed since the last run was finished"),
    ],
)
def test_what_a_finished_run_does_not_fit_starts_anew_and_leaves_it_until_the_end(
    params: dict[str, Any], inputs: dict[str, str], said: str
) -> None:
    train("p", settings(), 80, 100)
    (note,) = train("p", settings(**params), 20, inputs=inputs, end=False)
    assert said in note
    assert "starting anew" in note
    assert kept("p") == [80, 100]
    assert begun("p")[0] == [20]
    train("p", settings(**params), 40, inputs=inputs)
    assert kept("p") == [40]


def test_other_code_starts_anew_and_goes_on_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    train("p", settings(), 80, 100)
    monkeypatch.setattr(job, "code_digest", lambda: "other")
    (note,) = train("p", settings(), end=False)
    assert "the last run was finished by other code" in note
    assert "`python -m tasks.pretrain p --branch p` goes on from them" in note
    assert not resume.unfinished("p")
    longer = settings(tokens=64 * 200)
    assert "from step 80 of p" in branch.branch("p", "p", step=None, params=longer, inputs=INPUTS)
    (note,) = train("p", longer)
    assert "going on from step 80 with" in note


def test_a_damaged_one_is_named_and_the_other_taken_and_with_both_damaged_training_starts_anew() -> None:
    train("p", settings(), 80, 100)
    folder = finished.folder("p")
    assert folder is not None
    (folder / "checkpoints/step-00000100/weights.pt").write_bytes(b"weights of 101")
    notes = train("p", settings(), end=False)
    assert "step-00000100 is damaged: weights.pt: its content has changed" in notes[0]
    assert "going on from step 80" in notes[1]
    shutil.rmtree(next(iter(resume.unfinished("p"))))
    (folder / "training/log.jsonl").write_bytes(b"x" * 2000)
    notes = train("p", settings(), end=False)
    assert [("damaged" in note, "starting anew" in note) for note in notes] == [(1, 0), (1, 0), (0, 1)]
    assert not resume.unfinished("p")


def test_another_pipeline_begins_from_a_kept_step_of_a_finished_or_of_a_running_one() -> None:
    train("p", settings(), 80, 100)
    short = settings(tokens=64 * 90, decay_share=0.1)
    said = branch.branch("q", "p", step=None, params=short, inputs=INPUTS)
    assert said == "q begins from step 80 of p; run it: `dvc repro pretrain@q`"
    assert begun("q") == ([80], lines(80))
    with pytest.raises(TrainingError, match=r"q has unfinished training up to step 80.*--discard"):
        branch.branch("q", "p", step=80, params=short, inputs=INPUTS)
    with resume.workspace("q", params=short, inputs=INPUTS):  # being trained
        branch.branch("r", "q", step=80, params=settings(), inputs=INPUTS)
    assert begun("r") == ([80], lines(80))


@pytest.mark.parametrize(
    ("step", "params", "inputs", "told"),
    [
        (90, {}, INPUTS, r"p has no checkpoint of step 90; kept: 80, 100"),
        (
            None,
            {},
            INPUTS | {"model": "x", "corpus": "y"},
            "from p: the converted model, the corpus of the two are not",
        ),
        (None, {"seed": 1}, INPUTS, "step 100: pretrain.seed: 0 -> 1"),
        (100, {"tokens": 64 * 200}, INPUTS, "step 100: pretrain.tokens: 6400 -> 12800"),
    ],
)
def test_a_branch_that_would_be_another_run_is_refused_by_name(
    step: int | None, params: dict[str, Any], inputs: dict[str, str], told: str
) -> None:
    train("p", settings(), 80, 100)
    with pytest.raises(TrainingError, match=told):
        branch.branch("q", "p", step=step, params=settings(**params), inputs=inputs)
    assert not resume.unfinished("q")
    with pytest.raises(TrainingError, match="z has no checkpoint"):
        branch.branch("q", "z", step=step, params=settings(**params), inputs=inputs)


def test_an_unfinished_run_in_its_decay_says_from_where_it_can_be_made_longer_and_goes_back_if_asked() -> None:
    train("p", settings(), 80, 90, end=False)
    longer = settings(tokens=64 * 200)
    with pytest.raises(TrainingError, match=r"go back to step 80.*`python -m tasks.pretrain p --branch p --step 80`"):
        train("p", longer)
    assert begun("p")[0] == [80, 90]
    branch.branch("p", "p", step=80, params=longer, inputs=INPUTS)
    assert begun("p")[0] == [80]
    assert train("p", longer, 200) == ["going on from step 80 with pretrain.tokens: 6400 -> 12800"]


def test_discarding_takes_unfinished_work_first_and_then_what_is_kept_of_the_finished() -> None:
    train("p", settings(), 80, 100)
    train("p", settings(tokens=64 * 200), 150, end=False)
    assert "up to step 150. The finished run's checkpoints are still kept" in resume.discard("p")
    assert kept("p") == [80, 100]
    assert resume.discard("p") == "deleted what was kept of the finished training of p: step 80, 100"
    assert not (scratch.ROOT / "finished-p").exists()
    assert resume.discard("p") == "p has no unfinished training"


@pytest.mark.parametrize("operations", range(12))
def test_killed_while_it_is_put_aside_a_finished_run_can_still_be_published(
    operations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    train("p", settings(), 80, 100)
    train("p", settings(tokens=64 * 200), 160, 200, end=False)
    left = operations

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        for holder, name in [(Path, "rename"), (Path, "unlink"), (shutil, "rmtree")]:
            patch.setattr(holder, name, counted(getattr(holder, name)))
        train("p", settings(tokens=64 * 200))
    train("p", settings(tokens=64 * 200), end=False)
    steps, log = begun("p")
    assert steps[-1] == 200
    assert log == lines(200)
    train("p", settings(tokens=64 * 200))
    assert kept("p")[-1] == 200
