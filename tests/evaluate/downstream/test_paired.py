"""Intervals of differences on the same items, gaps between tasks, and means of suites."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tasks import settings
from tasks.evaluate.downstream import paired

RNG = np.random.default_rng(1)
INSIDE = {model: (RNG.random(400) < p).astype(int).tolist() for model, p in (("dense", 0.8), ("trained", 0.7))}
OUTSIDE = {model: (RNG.random(300) < p).astype(int).tolist() for model, p in (("dense", 0.6), ("trained", 0.36))}
TASKS = [
    settings.Task(name="easy", metric="acc"),
    settings.Task(name="hard", adversarial_of="easy"),
    settings.Task(name="odd", ood_of="easy"),
]
ITEMS: dict[str, Any] = {
    "easy": {"items": [str(i) for i in range(400)], "metrics": {"acc": INSIDE}},
    "hard": {"items": [str(i) for i in range(300)], "metrics": {"acc": OUTSIDE}},
}
SCORES = {
    model: {
        name: {"acc": float(np.mean(of[model])), "acc_stderr": 0.02, "n": len(of[model]), "chance": 1 / 3}
        for name, of in (("easy", INSIDE), ("hard", OUTSIDE))
    }
    for model in ("dense", "trained")
}


def test_intervals_are_those_of_scipys_bootstrap_by_another_seed_and_method() -> None:
    """The limits of 2,000 draws wander by some 3 % of the width; BCa differs from percentiles by less for a mean."""
    delta = np.subtract(INSIDE["trained"], INSIDE["dense"])
    low, high = paired.interval(delta)
    other = stats.bootstrap((delta,), np.mean, n_resamples=5000, batch=200, rng=np.random.default_rng(9))
    width = other.confidence_interval.high - other.confidence_interval.low
    assert low == pytest.approx(other.confidence_interval.low, abs=0.06 * width)
    assert high == pytest.approx(other.confidence_interval.high, abs=0.06 * width)


def test_the_interval_of_a_gap_draws_the_two_tasks_apart() -> None:
    low, high = paired.interval(INSIDE["dense"], OUTSIDE["dense"])
    variances = [np.var(sample) / len(sample) for sample in (INSIDE["dense"], OUTSIDE["dense"])]
    middle = np.mean(INSIDE["dense"]) - np.mean(OUTSIDE["dense"])
    for limit, sign in ((low, -1), (high, 1)):
        assert limit == pytest.approx(middle + sign * 1.96 * math.sqrt(sum(variances)), abs=0.012)


def test_an_interval_is_the_same_each_time_and_a_point_where_nothing_varies() -> None:
    delta = np.subtract(INSIDE["trained"], INSIDE["dense"])
    assert paired.interval(delta) == paired.interval(delta)
    assert paired.interval([1.0] * 30) == (1.0, 1.0)
    assert paired.interval([1.0]) == (1.0, 1.0)


def test_differences_are_between_the_trained_model_and_the_others_that_were_judged() -> None:
    found = paired.differences(ITEMS)["easy"]["acc"]
    assert list(found) == ["trained_dense"]
    assert found["trained_dense"]["difference"] == pytest.approx(np.mean(INSIDE["trained"]) - np.mean(INSIDE["dense"]))
    assert found["trained_dense"]["low"] < found["trained_dense"]["difference"] < found["trained_dense"]["high"]


def test_a_pair_has_the_gap_of_every_model_and_the_difference_of_gaps() -> None:
    (row,) = paired.robustness(TASKS, ITEMS, SCORES)  # `odd` was not judged
    assert (row["task"], row["of"], row["kind"]) == ("hard", "easy", "adversarial")
    for model, found in row["models"].items():
        assert found["gap"] == pytest.approx(np.mean(INSIDE[model]) - np.mean(OUTSIDE[model]))
        assert found["low"] < found["gap"] < found["high"]
    assert row["models"]["dense"]["at_chance"] == []
    assert row["models"]["trained"]["at_chance"] == ["outside"]
    gaps = {model: found["gap"] for model, found in row["models"].items()}
    assert row["differences"]["trained_dense"]["gap"] == pytest.approx(gaps["trained"] - gaps["dense"])


def test_a_suite_says_how_many_of_its_tasks_its_mean_is_over() -> None:
    judged = {task.name: task for task in TASKS}
    found = paired.suites({"mine": TASKS}, judged, SCORES)["mine"]
    assert (found["tasks"], found["judged"]) == (3, {"easy": "acc", "hard": "acc"})
    assert found["mean"]["dense"] == pytest.approx((np.mean(INSIDE["dense"]) + np.mean(OUTSIDE["dense"])) / 2)


@pytest.mark.parametrize(
    ("wanted", "scores", "metric"),
    [
        (None, {"f1": 1, "f1_stderr": 0, "acc": 1, "acc_stderr": 0}, "acc"),
        (None, {"ppl": 1, "f1": 1, "f1_stderr": 0}, "f1"),
        ("acc_norm", {"acc": 1, "acc_stderr": 0, "acc_norm": 1}, "acc_norm"),
        ("acc_norm", {"acc": 1, "acc_stderr": 0}, None),
        (None, {"n": 3}, None),
    ],
)
def test_the_main_metric_is_the_one_named_else_accuracy(wanted: str | None, scores: Any, metric: str | None) -> None:
    assert paired.main_metric(settings.Task(name="t", metric=wanted), scores) == metric
