from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tasks.corpus.sampling.sampler import Sampler
from tasks.pretrain.health.loss_guard import DECAY, WARM, LossGuard, Rollback, Rollbacks
from tasks.pretrain.job import TrainingError
from tasks.settings.pretrain import Guard as Settings


def guard(**knobs: Any) -> LossGuard:
    return LossGuard(Settings(**knobs), seq_len=64)


def test_a_stop_says_what_where_what_is_kept_and_what_to_try() -> None:
    with pytest.raises(TrainingError) as caught:
        guard().decide(
            step=7,
            loss=math.nan,
            norm=None,
            windows=[("code", 3), ("prose", 5)],
            kept=lambda: "the checkpoint of step 6",
        )
    message = str(caught.value)
    assert message.startswith("the loss is not finite at step 7 (windows of 64 tokens: code window 3, prose window 5)")
    assert "Kept: the checkpoint of step 6. Try a lower pretrain.learning_rate" in message
    assert "guard.policy: skip or rollback" in message
    with pytest.raises(TrainingError, match=r"the gradient norm is not finite at step 2\. Kept: nothing yet"):
        guard().decide(step=2, loss=1.0, norm=math.inf)
    with pytest.raises(TrainingError, match=r"w 7 and 92 more\)"):
        guard().decide(step=1, loss=1.0, norm=math.inf, windows=[("w", i) for i in range(100)])


@pytest.mark.parametrize("broken", [True, False])
def test_a_run_that_breaks_before_its_first_update_is_not_told_to_lower_its_rate(tmp_path: Path, broken: bool) -> None:
    weights = {"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(3, 4)}
    if broken:
        weights["lm_head.weight"][1, 2] = math.nan
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(TrainingError) as caught:
        LossGuard(Settings(), seq_len=64, models=[tmp_path]).decide(step=1, loss=math.nan, norm=None)
    message = str(caught.value)
    assert "learning_rate" not in message
    if broken:
        assert f"{tmp_path}: model.safetensors: lm_head.weight holds nan at [1, 2]" in message
    else:
        assert "those of the models are finite: try precision: float32" in message


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_after_the_limit_of_interventions_in_a_row_the_run_stops(policy: str) -> None:
    one = guard(policy=policy, limit=2)
    assert [one.decide(step=step, loss=math.inf, norm=None) for step in (1, 2)] == [policy, policy]
    with pytest.raises(
        TrainingError, match=rf"step 3, and 2 of pretrain.guard.limit = 2 {policy}s in a row are used up"
    ):
        one.decide(step=3, loss=math.inf, norm=None)


def test_a_sound_step_after_a_skip_starts_the_count_again() -> None:
    one = guard(policy="skip", limit=1)
    for step in range(1, 9, 2):
        assert one.decide(step=step, loss=math.nan, norm=None) == "skip"
        assert one.decide(step=step + 1, loss=1.0, norm=None) == "sound"  # before the optimizer step it isn't done yet
        assert one.state()["interventions"] == 1
        assert one.decide(step=step + 1, loss=1.0, norm=1.0) == "sound"


def test_sound_steps_before_the_place_that_failed_do_not_start_the_count_again() -> None:
    one = guard(policy="rollback", limit=3)
    for place in (80, 60, 60):
        assert one.decide(step=place, loss=math.nan, norm=None) == "rollback"
        for step in range(50, 80):
            assert one.decide(step=step, loss=1.0, norm=1.0) == "sound"
    with pytest.raises(TrainingError, match="rollbacks in a row"):
        one.decide(step=70, loss=math.nan, norm=None)
    assert one.decide(step=80, loss=1.0, norm=1.0) == "sound"
    assert one.decide(step=81, loss=math.nan, norm=None) == "rollback"


def test_the_running_mean_is_the_weighted_mean_of_the_sound_losses() -> None:
    one = guard(policy="skip", spike=3.0)
    losses = [5.0 - 0.1 * i for i in range(30)]
    assert one.mean is None
    for step, loss in enumerate(losses, 1):
        one.decide(step=step, loss=loss, norm=1.0)
    weights = [DECAY ** (len(losses) - 1 - i) for i in range(len(losses))]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert one.mean == pytest.approx(expected, rel=1e-12)
    assert one.decide(step=31, loss=3.001 * expected, norm=None) == "skip"
    assert one.mean == pytest.approx(expected, rel=1e-12)
    assert one.decide(step=32, loss=2.999 * expected, norm=None) == "sound"


def test_a_spike_is_told_only_after_the_first_sound_steps_and_only_if_asked_for() -> None:
    for knobs, expected in (({"spike": 2.0}, "skip"), ({}, "sound")):
        one = guard(policy="skip", **knobs)
        for step in range(1, WARM):
            assert one.decide(step=step, loss=1.0, norm=1.0) == "sound"
        assert one.decide(step=WARM, loss=100.0, norm=None) == "sound"
        one.decide(step=WARM, loss=1.0, norm=1.0)
        assert one.decide(step=WARM + 1, loss=2.1, norm=None) == expected
    assert guard(spike=2.0).fault(loss=9.0, norm=None) is None
    stop = guard(spike=2.0)
    for step in range(1, WARM + 1):
        stop.decide(step=step, loss=1.0, norm=1.0)
    with pytest.raises(
        TrainingError, match=r"loss is 2.1, above 2 \(pretrain.guard.spike\) times its running mean 1, at"
    ):
        stop.decide(step=WARM + 1, loss=2.1, norm=None)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.one_of(st.floats(0.1, 10), st.just(math.nan)), min_size=1, max_size=60),
    st.integers(0, 60),
    st.booleans(),
)
def test_a_guard_restored_from_json_decides_as_the_one_that_was_never_interrupted(
    losses: list[float], cut: int, in_norm: bool
) -> None:
    def decided(one: LossGuard, step: int) -> str:
        loss = losses[step]
        given = (1.0, loss) if in_norm else (loss, 1.0)
        return one.decide(step=step + 1, loss=given[0], norm=given[1])

    def run(*, interrupted: bool) -> tuple[list[str], dict[str, Any]]:
        one, decisions = guard(policy="skip", spike=1.5, limit=4), []
        for step in range(len(losses)):
            if interrupted and step == cut:
                state = json.loads(json.dumps(one.state(), allow_nan=False))
                one = guard(policy="skip", spike=1.5, limit=4)
                one.restore(state)
            try:
                decisions.append(decided(one, step))
            except TrainingError as error:
                return [*decisions, str(error)], one.state()
        return decisions, one.state()

    assert run(interrupted=True) == run(interrupted=False)


# A run without an engine: the weights are a number that depends on every batch in order, checkpoints are files, and it
# can be killed at any of its moments. What the loop does around LossGuard and Rollbacks is written out here.


class Killed(BaseException):
    """kill -9."""


@dataclass
class Run:
    folder: Path
    poisoned: set[int] = field(default_factory=set)
    """Numbers of batches, in the order drawn, with a loss that isn't finite."""
    cliff: int = 0
    """A step that no batch survives."""
    kills: set[int] = field(default_factory=set)
    moment: int = 0
    steps: int = 14
    log: list[Any] = field(default_factory=list)
    weights: float = 1.0
    step: int = 0

    def to_the_end(self) -> tuple[Any, float]:
        while True:
            try:
                self._start()
            except Killed:
                continue
            except TrainingError as error:
                return str(error), self.weights
            return self.log, self.weights

    def _tick(self) -> None:
        self.moment += 1
        assert self.moment < 300, "the run doesn't end"
        if self.moment in self.kills:
            raise Killed

    def _start(self) -> None:
        self.rollbacks = Rollbacks(self.folder)
        self.log, self.weights, self.step = [], 1.0, 0
        self.guard = guard(policy="rollback", limit=3)
        self.sampler = Sampler({"a": 9, "b": 5}, weights={"a": 2, "b": 1}, seed=1, batch=2, corpus_sha256="")
        if not (self.folder / "latest").exists():
            self._save()  # at step 0: something to go back to
        self._reload()
        while self.step < self.steps:
            self._train_step()

    def _train_step(self) -> None:
        self.step += 1
        self._tick()
        bad = self.sampler.step in self.poisoned or self.step == self.cliff
        slots = self.sampler.next()
        loss = math.nan if bad else abs(math.sin(self.weights)) + 1
        if self.guard.decide(step=self.step, loss=loss, norm=None) == "rollback":
            return self._roll_back()
        self._tick()
        for domain, window in slots:
            self.weights = math.fmod(self.weights * 1.1 + 0.01 * window + (domain == "a"), 7.0)
        self.guard.decide(step=self.step, loss=loss, norm=1.0)
        self.log.append([self.step, slots, loss])
        if self.step % 4 == 0:
            self._save()
        return None

    def _roll_back(self) -> None:
        checkpoint = self._checkpoint()
        self._tick()
        self.rollbacks.add(
            checkpoint,
            Rollback(
                step=self.step,
                to_step=checkpoint["step"],
                message=f"step {self.step} was not sound",
                sampler=self.sampler.state(),
                guard=self.guard.state(),
            ),
        )
        self._tick()
        self._reload()

    def _save(self) -> None:
        state = {"step": self.step, "weights": self.weights, "log": len(self.log), "kept": self.log}
        state |= {"sampler": self.sampler.state(), "guard": self.guard.state()}
        self._tick()
        (self.folder / f"step-{self.step}").write_text(json.dumps(state))
        self._tick()
        (self.folder / "latest").write_text(str(self.step))
        self._tick()

    def _checkpoint(self) -> dict[str, Any]:
        latest = json.loads((self.folder / "latest").read_text())
        return json.loads((self.folder / f"step-{latest}").read_text())

    def _reload(self) -> None:
        state = self._checkpoint()
        self.step, self.weights, self.log = state["step"], state["weights"], state["kept"][: state["log"]]
        self.sampler.restore(state["sampler"])
        self.guard.restore(state["guard"])
        for rollback in self.rollbacks.after(state):
            self.log.append(rollback.message)
            self.sampler.restore(rollback.sampler)
            self.guard.restore(rollback.guard)


def simulated(**options: Any) -> tuple[Any, float, int]:
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):  # a kill isn't a power cut
        run = Run(folder=Path(folder), **options)
        log, weights = run.to_the_end()
        return json.loads(json.dumps(log)), weights, run.moment


@settings(deadline=None, max_examples=40)
@given(
    st.sets(st.integers(0, 20), max_size=5),
    st.sampled_from([0, 0, 3, 11]),
    st.sets(st.integers(1, 70), max_size=6),
)
def test_a_run_with_rollbacks_that_is_killed_at_any_moments_ends_as_the_one_that_was_not(
    poisoned: set[int], cliff: int, kills: set[int]
) -> None:
    through = simulated(poisoned=poisoned, cliff=cliff)[:2]
    assert simulated(poisoned=poisoned, cliff=cliff, kills=kills)[:2] == through


def test_every_single_moment_of_a_run_with_three_rollbacks_to_one_checkpoint_survives_a_kill() -> None:
    poisoned = {5, 6, 9}
    log, weights, moments = simulated(poisoned=poisoned)
    told = [entry for entry in log if isinstance(entry, str)]
    assert told == [f"step {step} was not sound" for step in (6, 5, 7)]
    done = [entry for entry in log if not isinstance(entry, str)]
    assert [step for step, _, _ in done] == list(range(1, 15))
    sampler = Sampler({"a": 9, "b": 5}, weights={"a": 2, "b": 1}, seed=1, batch=2, corpus_sha256="")
    drawn = [[list(slot) for slot in sampler.next()] for _ in range(20)]
    # the steps after the checkpoint see what follows the last batch that wasn't sound
    assert [slots for _, slots, _ in done] == drawn[:4] + drawn[10:]
    for moment in range(1, moments + 1):
        assert simulated(poisoned=poisoned, kills={moment})[:2] == (log, weights)


def test_a_step_that_no_batch_survives_ends_the_run_at_the_limit() -> None:
    message, _, _ = simulated(cliff=11)
    assert "step 11, and 3 of pretrain.guard.limit = 3 rollbacks in a row are used up" in message


def test_a_rollback_is_meant_for_its_checkpoint_and_not_for_a_later_one_of_the_same_step(tmp_path: Path) -> None:
    def entry(step: int) -> Rollback:
        return Rollback(
            step=step, to_step=8, message=f"from {step}", sampler={"step": step}, guard={"mean": 0.1 + 0.2}
        )

    first, again = {"step": 8, "sampler": {"step": 8}}, {"step": 8, "sampler": {"step": 15}}
    assert Rollbacks(tmp_path).after(first) == []
    Rollbacks(tmp_path).add(first, entry(10))
    Rollbacks(tmp_path).add(first, entry(12))
    assert Rollbacks(tmp_path).after(first) == [entry(10), entry(12)]
    assert Rollbacks(tmp_path).after(again) == []
    Rollbacks(tmp_path).add(first, entry(10))  # done again from an older checkpoint
    assert Rollbacks(tmp_path).after(first) == [entry(10)]


def test_a_full_disk_leaves_the_rollbacks_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollback = Rollback(step=2, to_step=1, message="", sampler={"step": 2}, guard={})
    checkpoint = {"step": 1, "sampler": {"step": 1}}
    Rollbacks(tmp_path).add(checkpoint, rollback)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left.*rollbacks.json"):
        Rollbacks(tmp_path).add(checkpoint, rollback)
    assert Rollbacks(tmp_path).after(checkpoint) == [rollback]
    assert [path.name for path in tmp_path.iterdir()] == ["rollbacks.json"]
