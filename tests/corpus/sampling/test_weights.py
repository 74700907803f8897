from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.sampling import weights


@settings(deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e6)), min_size=1, max_size=40).filter(any))
def test_quantised_weights_sum_to_one_and_stay_close(values: list[float]) -> None:
    result = weights.quantise(values)
    total = math.fsum(values)
    assert sum(result) == 2**32
    for value, whole in zip(values, result, strict=True):
        assert whole >= 0
        assert abs(whole - value / total * 2**32) < 2
        assert value or whole == 0


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1.0, -0.1], [math.nan], [math.inf, 1.0]])
def test_weights_that_name_no_mixture_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="positive sum"):
        weights.quantise(values)
