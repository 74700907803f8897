"""When a retrained model is accepted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import quality_gate

LN2 = math.log(2)


def record(bits: list[float], *, windows: str = "abcdefgh", dense: list[float] | None = None, **more: Any) -> Any:
    """A record whose windows of 100 bytes have so many bits per byte each."""
    size = len(bits)
    domain = {
        "windows": list(windows[:size]),
        "bytes": [100] * size,
        "trained": [100 * LN2 * b for b in bits],
        "dense": [100 * LN2 * b for b in dense or [1.0] * size],
    }
    return {"trained": float(np.mean(bits)), "dense": 1.0, "parent": "p", "domains": {"prose": domain}, **more}


BITS = st.lists(st.floats(0.1, 10), min_size=4, max_size=4)


@given(BITS, BITS, st.floats(0, 1), st.floats(0, 1))
def test_a_model_is_refused_exactly_if_it_is_worse_by_more_than_tolerance_and_two_standard_errors(
    new: list[float], old: list[float], tolerance: float, slipped: float
) -> None:
    deltas = np.subtract(new, old)
    worse = deltas.mean() + slipped - tolerance - 2 * deltas.std(ddof=1) / 2
    decision = quality_gate.decide(record(new), record(old, slipped=slipped), tolerance=tolerance)
    if abs(worse) > 1e-9:
        assert decision.accepted == (worse < 0)
    assert decision.slipped == pytest.approx(max(deltas.mean() + slipped, 0))


def test_noise_alone_lets_no_series_of_models_get_worse_and_worse() -> None:
    """Each is 0.01 worse than the one before it, and the windows' noise would hide 0.02."""
    last, accepted = record([1.0, 1.0, 1.0, 1.0]), 0
    for week in range(1, 20):
        noise = [0.02 * (-1) ** i * (-1) ** week * math.sqrt(3) / 2 for i in range(4)]
        new = record([1.0 + 0.01 * week + n for n in noise])
        decision = quality_gate.decide(new, last, tolerance=0.0)
        if decision.accepted:
            last, accepted = {**new, "slipped": decision.slipped}, accepted + 1
    assert 0 < accepted < 5


def test_windows_in_common_are_compared_in_pairs_and_others_by_the_distance_to_the_parent() -> None:
    """The new text is 0.5 bits harder for everybody; the model is 0.1 better than it was."""
    old = record([1.0, 3.0, 1.0, 3.0], dense=[0.5, 2.5, 0.5, 2.5])
    paired = quality_gate.compare(record([0.9, 2.9, 0.9, 2.9], windows="abcd"), old)
    assert paired is not None
    assert (paired.difference, paired.stderr, paired.other) == (pytest.approx(-0.1), pytest.approx(0, abs=1e-9), [])
    moved = record([1.4, 3.4, 1.4, 3.4], dense=[1.0, 3.0, 1.0, 3.0], windows="wxyz")
    comparison = quality_gate.compare(moved, old)
    assert comparison is not None
    assert (comparison.difference, comparison.stderr, comparison.other) == (
        pytest.approx(-0.1),
        pytest.approx(0, abs=1e-9),
        ["prose"],
    )
    assert "on other windows of prose" in quality_gate.decide(moved, old, tolerance=0).why
    other_parent = quality_gate.compare({**moved, "parent": "q"}, old)
    assert other_parent is not None
    assert other_parent.difference == pytest.approx(0.4)
    assert other_parent.stderr == pytest.approx(
        math.sqrt(2 * (4 / 3) / 4)
    )  # two samples of variance 4/3, 4 windows each


def test_half_of_the_windows_in_common_are_enough_for_pairs() -> None:
    old = record([1.0, 2.0, 3.0, 4.0])
    comparison = quality_gate.compare(record([1.1, 2.1, 9.0, 9.0], windows="abyz"), old)
    assert comparison is not None
    assert (comparison.difference, comparison.other) == (pytest.approx(0.1), [])


def test_only_domains_that_both_were_evaluated_on_count() -> None:
    old, new = record([1.0, 1.0]), record([1.0, 1.0])
    new["domains"]["code"] = {**new["domains"]["prose"], "trained": [900.0, 900.0]}
    comparison = quality_gate.compare(new, old)
    assert comparison is not None
    assert (comparison.difference, comparison.domains) == (0.0, ["prose"])
    new["domains"].pop("prose")
    decision = quality_gate.decide(new, old, tolerance=9.0)
    assert not decision.accepted
    assert "cannot be compared" in decision.why


def test_a_refusal_tells_the_numbers_and_the_rule() -> None:
    decision = quality_gate.decide(record([1.25, 1.25]), record([1.2, 1.2]), tolerance=0.01)
    assert decision.why == (
        "refused: 1.2500 bits per byte is 0.0500 worse than the accepted 1.2000 (standard error 0.0000; n = 2, on the "
        "same windows of prose); allowed: tolerance 0.0100 + 2 standard errors"
    )


def test_a_single_window_leaves_no_room_for_noise() -> None:
    decision = quality_gate.decide(record([1.0001]), record([1.0]), tolerance=0.0)
    assert not decision.accepted
    assert "standard error unknown, for a domain has one window" in decision.why


def test_the_first_model_is_accepted() -> None:
    assert quality_gate.decide(record([9.0, 9.0]), None, tolerance=0.0).accepted


@pytest.mark.parametrize("new", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_refused_even_as_the_first(new: float) -> None:
    assert not quality_gate.decide(record([1.0, new]), None, tolerance=1.0).accepted
    assert not quality_gate.decide(record([1.0, new]), record([1.0, 1.0]), tolerance=1.0).accepted


def test_a_record_survives_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert quality_gate.accepted("demo") is None
    written = record([1.0, 2.0, 3.0], release="ab")
    quality_gate.write(quality_gate.record("demo"), written)
    assert quality_gate.accepted("demo") == written
    assert len(Path("runs/demo/accepted.json").read_text().splitlines()) < 16  # a line for each list, not each number
    Path("runs/demo/accepted.json").write_text(json.dumps({"trained": 1.0, "dense": 1.0}))  # of an older version
    assert not quality_gate.decide(record([1.0, 1.0]), quality_gate.accepted("demo"), tolerance=1.0).accepted
