from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.pretrain.schedule import share


@given(steps=st.integers(2, 500), data=st.data(), final=st.floats(0, 1))
def test_the_rate_rises_to_its_peak_at_the_end_of_warm_up_and_falls_to_its_floor_at_the_last_step(
    steps: int, data: st.DataObject, final: float
) -> None:
    warmup = data.draw(st.integers(1, steps - 1))
    shares = [share(step, steps=steps, warmup=warmup, final=final) for step in range(1, steps + 1)]
    assert shares[0] == pytest.approx(1 / warmup)
    assert shares[warmup - 1] == 1
    assert shares[-1] == pytest.approx(final)
    assert shares[:warmup] == sorted(shares[:warmup])
    assert all(a >= b - 1e-12 for a, b in zip(shares[warmup - 1 :], shares[warmup:], strict=False))


def test_half_way_down_the_rate_is_the_mean_of_peak_and_floor() -> None:
    assert share(60, steps=110, warmup=10, final=0.1) == pytest.approx(0.55)


def test_a_single_step_without_warm_up_has_a_rate() -> None:
    assert share(1, steps=1, warmup=0, final=0.1) == pytest.approx(0.1)
