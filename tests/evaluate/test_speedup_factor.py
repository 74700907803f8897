"""The speed-up factor on curves whose factor is known in closed form."""

from __future__ import annotations

import math

import pytest

from tasks.evaluate import speedup_factor
from tasks.evaluate.speedup_factor import Curve, OutsideError

COSTS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


def straight(name: str, *, factor: float = 1.0, slope: float = 0.5, costs: list[float] = COSTS) -> Curve:
    """loss = 5 - slope ln(factor x cost): `factor` times less cost for each loss, linear in the logarithm."""
    losses = [5 - slope * math.log(factor * cost) for cost in costs]
    return Curve(name=name, loss=losses, costs={"tokens": costs, "flops": [3 * cost for cost in costs]})


def test_a_run_that_needs_a_third_has_the_factor_3_at_every_loss_of_the_common_range() -> None:
    dense, moe = straight("dense"), straight("moe", factor=3.0)
    for by in ("tokens", "flops"):
        found = speedup_factor.factor(dense, moe, by=by)
        assert [found.value, found.lowest, found.highest] == pytest.approx([3.0] * 3)
        assert found.loss == pytest.approx(dense.loss[-1])  # the lowest that both reached
        assert found.highest_loss == pytest.approx(moe.loss[0])
    assert speedup_factor.factor(moe, dense, by="tokens").value == pytest.approx(1 / 3)


def test_other_evaluation_points_give_the_same_factor_and_other_slopes_a_range() -> None:
    dense, moe = straight("dense"), straight("moe", factor=3.0, costs=[1.5, 5.0, 11.0])
    assert speedup_factor.factor(dense, moe, by="tokens").value == pytest.approx(3.0)
    steep = straight("steep", slope=1.0)  # a loss 5 - s costs exp(s) here, and exp(2 s) in `dense`
    found = speedup_factor.factor(dense, steep, by="tokens")
    lowest = dense.loss[-1]
    assert found.value == found.highest == pytest.approx(math.exp(5 - lowest))
    assert found.lowest == pytest.approx(1.0)
    assert (found.loss, found.highest_loss) == (pytest.approx(lowest), pytest.approx(5.0))


def test_the_cost_of_a_loss_is_log_linear_between_its_neighbours_and_exact_at_an_evaluation() -> None:
    curve = Curve(name="run", loss=[4.0, 3.0, 2.0], costs={"tokens": [10.0, 100.0, 10_000.0]})
    assert speedup_factor.cost(curve, 3.0, by="tokens") == pytest.approx(100.0)
    assert speedup_factor.cost(curve, 3.5, by="tokens") == pytest.approx(math.sqrt(1000.0))
    assert speedup_factor.cost(curve, 2.25, by="tokens") == pytest.approx(100.0 * 100.0**0.75)
    for outside in (4.01, 1.99):
        with pytest.raises(
            OutsideError, match=r"run: a loss of .* outside .*, 4.000 down to 2.000, and nothing is ext"
        ):
            speedup_factor.cost(curve, outside, by="tokens")


def test_what_was_reached_at_no_cost_or_only_later_again_encloses_nothing() -> None:
    curve = Curve(name="run", loss=[3.0, 3.2, 2.9, 2.95, 2.8], costs={"tokens": [0.0, 1.0, 2.0, 4.0, 8.0]})
    assert speedup_factor.cost(curve, 2.9, by="tokens") == pytest.approx(2.0)
    assert speedup_factor.cost(curve, 2.85, by="tokens") == pytest.approx(4.0)  # half-way from 2 to 8, not from 4
    with pytest.raises(OutsideError, match=r"2.900 down to 2.800"):
        speedup_factor.cost(curve, 2.95, by="tokens")
    worse = Curve(name="worse", loss=[3.0, 3.1], costs={"tokens": [0.0, 1.0]})
    with pytest.raises(OutsideError, match="worse: no evaluation after its start is better"):
        speedup_factor.factor(curve, worse, by="tokens")


def test_runs_without_a_common_loss_have_no_factor_and_the_message_says_who_is_ahead() -> None:
    costs = {"tokens": [0.0, 1.0, 2.0]}
    child = Curve(name="child", loss=[3.5, 3.4, 3.3], costs=costs)
    moe = Curve(name="moe", loss=[3.35, 3.2, 3.1], costs=costs)
    sentence = (
        r"no loss was reached in both runs: child ends at 3.300, and moe is below that at its first eval.*\(3.200\)"
    )
    for pair in ((child, moe), (moe, child)):
        with pytest.raises(OutsideError, match=sentence):
            speedup_factor.factor(*pair, by="tokens")
    ahead = Curve(name="moe", loss=[3.25, 3.2, 3.1], costs=costs)
    with pytest.raises(OutsideError, match="moe is below that already before training; nothing is extrapolated"):
        speedup_factor.factor(child, ahead, by="tokens")


def test_several_runs_cost_what_the_cheapest_of_them_does_at_each_loss() -> None:
    small = Curve(name="small", loss=[4.0, 3.0, 2.9], costs={"flops": [1.0, 2.0, 64.0]})
    large = Curve(name="large", loss=[4.5, 3.5, 2.5], costs={"flops": [4.0, 8.0, 16.0]})
    both = speedup_factor.cheapest([small, large], by="flops")
    assert both.name == "small / large"
    assert speedup_factor.cost(both, 3.0, by="flops") == pytest.approx(2.0)
    assert speedup_factor.cost(both, 2.5, by="flops") == pytest.approx(16.0)
    assert speedup_factor.cost(both, 2.75, by="flops") == pytest.approx(math.sqrt(2.0 * 16.0))
    moe = Curve(name="moe", loss=[3.0, 2.5], costs={"flops": [1.0, 4.0]})
    assert speedup_factor.factor(both, moe, by="flops").value == pytest.approx(4.0)


def test_where_one_run_passes_another_is_found_between_two_evaluations() -> None:
    # losses 5 - 0.5 ln c and 5.5 - ln c cross where 0.5 ln c = 0.5
    dense = straight("dense")
    moe = Curve(name="moe", loss=[5.5 - math.log(c) for c in COSTS], costs={"tokens": COSTS})
    assert speedup_factor.passes(moe, dense, by="tokens") == pytest.approx(math.e)
    assert speedup_factor.passes(dense, moe, by="tokens") is None
    assert speedup_factor.passes(straight("better", factor=2.0), dense, by="tokens") == pytest.approx(1.0)
    late = straight("late", costs=[100.0, 200.0])
    with pytest.raises(OutsideError, match="late and dense have no number of tokens in common"):
        speedup_factor.passes(late, dense, by="tokens")
