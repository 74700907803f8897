"""What a run had cost at each evaluation, by made-up logs."""

from __future__ import annotations

import pytest

from tasks.moe import counts
from tasks.pretrain.log import cost_curve
from tests.run_logs import CONFIG, records, training


def test_each_evaluation_has_the_tokens_flops_and_seconds_of_the_steps_before_it() -> None:
    params = training()
    curve = cost_curve.points(records(timed=True), config=CONFIG, params=params)
    each = counts.flops_per_token(CONFIG, seq_len=16)["train"]
    assert curve == {
        "step": [0, 4, 10],
        "tokens": [0, 256, 640],
        "flops": [0, 256 * each, 640 * each],
        "seconds": [0.0, 10.0, 55.0],
        "loss": [4.0, 3.6, 3.0],
    }


def test_phases_that_train_less_cost_less() -> None:
    params = training(train=[{"what": "router", "tokens": 128}, {"what": "all"}])
    router, everything = (counts.flops_per_token(CONFIG, seq_len=16, what=what)["train"] for what in ("router", "all"))
    found = cost_curve.points(records(timed=True), config=CONFIG, params=params)["flops"]
    assert router < everything
    assert found == [0, 128 * router + 128 * everything, 128 * router + 512 * everything]
    assert cost_curve.flops(CONFIG, params, step=1) == 64 * router


def test_a_log_without_timings_gives_no_seconds() -> None:
    curve = cost_curve.points(records(timed=False), config=CONFIG, params=training())
    assert "seconds" not in curve
    assert curve["loss"] == pytest.approx([4.0, 3.6, 3.0])
