from __future__ import annotations

import json

import numpy as np
import pytest

from tasks.plugins.aioli.hooks import Options, Sweeps
from tasks.plugins.proxy_runs import rules
from tasks.pretrain.job import TrainingError

DOMAINS = ["a", "b", "c"]
EFFECTS = np.array([[0.02, 0.0, 0.001], [0.0, 0.03, 0.0]])  # of a step on each domain alone, on two targets
PLAN = Options(updates=2, sweeps=2, sweep_steps=3)


def sweeps(steps: int = 50) -> Sweeps:
    return Sweeps(PLAN, domains=DOMAINS, target={"a": 0.75, "out": 0.25}, unseen=None, steps=steps, seed=7)


def train(
    one: Sweeps, steps: range, *, losses: np.ndarray, mix: dict[str, float]
) -> tuple[list[int], dict[str, float]]:
    """Losses that fall by exactly what the mix of each step says; the steps after which they were asked for."""
    asked = []
    for step in steps:
        if step:
            losses -= EFFECTS @ np.array([mix[domain] for domain in DOMAINS])
        if one.validates(step):
            asked.append(step)
            mix = one.after_validation(step, {"a": losses[0], "out": losses[1], "b": 9.0, "c": 9.0}) or {}
    return asked, mix


def test_the_mix_follows_the_effects_that_the_sweeps_reveal() -> None:
    one = sweeps()
    asked, mix = train(one, range(50), losses=np.array([4.0, 5.0]), mix={})
    assert asked == [*range(0, 19, 3), *range(25, 44, 3)]
    once = rules.aioli(dict.fromkeys(DOMAINS, 1 / 3), effects_TD=EFFECTS, importance_T=[0.75, 0.25])
    twice = rules.aioli(once, effects_TD=EFFECTS, importance_T=[0.75, 0.25])
    assert mix == one.weights == pytest.approx(twice)
    assert one.mean == pytest.approx({domain: (once[domain] + twice[domain]) / 2 for domain in DOMAINS})
    assert one.scores == pytest.approx(dict(zip(DOMAINS, (3 * EFFECTS.sum(0)).tolist(), strict=True)))
    assert mix["a"] > mix["b"] > mix["c"]


@pytest.mark.parametrize("at", [1, 8, 20, 30])
def test_sweeps_that_go_on_from_a_saved_state_end_with_the_same_numbers(at: int) -> None:
    whole = sweeps()
    expected = train(whole, range(50), losses=np.array([4.0, 5.0]), mix={})
    first, losses = sweeps(), np.array([4.0, 5.0])
    asked, mix = train(first, range(at), losses=losses, mix={})
    second = sweeps()
    second.restore(json.loads(json.dumps(first.state())))
    more, mix = train(second, range(at, 50), losses=losses, mix=mix)
    assert ([*asked, *more], mix) == expected
    assert second.state() == whole.state()


def test_a_round_must_be_longer_than_its_sweeps() -> None:
    with pytest.raises(TrainingError, match="36 steps in 2 rounds leave 18 a round, and 2 sweeps of 3 steps over 3"):
        sweeps(36)


def test_every_sweep_visits_every_domain_in_an_order_of_its_own() -> None:
    one = sweeps()
    orders = [one._order(number, sweep) for number in range(4) for sweep in range(4)]
    assert all(sorted(order) == DOMAINS for order in orders)
    assert len({tuple(order) for order in orders}) > 3
