from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.pretrain.schedule import share
from tasks.settings import Pretrain

SCHEDULES = ("cosine", "wsd", "linear", "constant")
SHARES = st.floats(0.01, 1)


def params(schedule: str, *, steps: int, warmup: int = 0, **fields: Any) -> Pretrain:
    """Steps of 32 tokens; tokens that are no whole number of steps are rounded up."""
    return Pretrain.model_validate(
        {"tokens": 32 * steps - 5, "seq_len": 8, "batch": 4, "learning_rate": 1e-3, "schedule": schedule}
        | {"warmup_tokens": max(0, 32 * warmup - 31)}
        | fields
    )


@given(schedule=st.sampled_from(SCHEDULES), steps=st.integers(2, 500), data=st.data(), final=st.floats(0, 1))
def test_the_rate_rises_to_its_peak_at_the_end_of_warm_up_and_falls_to_its_floor_at_the_last_step(
    schedule: str, steps: int, data: st.DataObject, final: float
) -> None:
    warmup = data.draw(st.integers(1, steps - 1))
    settings = params(schedule, steps=steps, warmup=warmup, final_lr_share=final, decay_share=data.draw(SHARES))
    shares = [share(step, settings) for step in range(1, steps + 1)]
    assert shares[0] == pytest.approx(1 / warmup)
    assert shares[warmup - 1] == 1
    assert shares[-1] == pytest.approx(1 if schedule == "constant" else final)
    assert shares[:warmup] == sorted(shares[:warmup])
    assert all(a >= b - 1e-12 for a, b in zip(shares[warmup - 1 :], shares[warmup:], strict=False))


@given(steps=st.integers(2, 500), data=st.data(), final=st.floats(0, 1))
def test_the_cosine_is_bit_for_bit_the_closed_form(steps: int, data: st.DataObject, final: float) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    settings = params("cosine", steps=steps, warmup=warmup, final_lr_share=final)
    for step in range(warmup + 1, steps + 1):
        progress = (step - warmup) / max(1, steps - warmup)
        assert share(step, settings) == final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", 0.55),  # half of the way down from 1 to 0.1
        ("linear", 0.55),
        ("constant", 1.0),
        ("wsd", 1.0),  # 22 of 110 steps decay, from step 88 on
    ],
)
def test_half_way_between_warm_up_and_end_every_schedule_has_its_closed_form(schedule: str, expected: float) -> None:
    settings = params(schedule, steps=110, warmup=10, final_lr_share=0.1)
    assert share(60, settings) == pytest.approx(expected)


def test_wsd_is_flat_until_its_last_share_of_steps_and_then_falls_by_the_square_root() -> None:
    settings = params("wsd", steps=100, warmup=10, final_lr_share=0.2, decay_share=0.25)
    assert [share(step, settings) for step in (10, 11, 50, 75)] == [1, 1, 1, 1]
    assert share(76, settings) == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(1 / 25)))
    assert share(91, settings) == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(16 / 25)))
    assert share(100, settings) == pytest.approx(0.2)


def test_a_decay_longer_than_what_follows_the_warm_up_begins_where_that_ends() -> None:
    settings = params("wsd", steps=10, warmup=6, final_lr_share=0.0, decay_share=1.0)
    assert share(6, settings) == 1
    assert share(7, settings) == pytest.approx(1 - math.sqrt(1 / 4))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_single_step_without_warm_up_has_a_rate(schedule: str) -> None:
    expected = 1.0 if schedule == "constant" else 0.1
    assert share(1, params(schedule, steps=1, final_lr_share=0.1)) == pytest.approx(expected)
