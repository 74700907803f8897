"""A swarm ends with the same units however often it was killed, and takes over those that still say something."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.mixture.problem import Problem
from tasks.plugins.proxy_runs import swarm, units
from tasks.plugins.proxy_runs.swarm import Unit
from tasks.pretrain.job import Diverged
from tasks.settings import Pretrain, Proxy, Swarm

PRIOR = {"a": 0.6, "b": 0.3, "c": 0.1}
TOKENS = {"a": 6000, "b": 3000, "c": 1000}


def problem(
    tokens: dict[str, int] = TOKENS, *, count: int = 12, target: dict[str, float] | None = None, **proxy: Any
) -> Problem:
    """A problem whose checkpoint and corpus are whatever the tests say."""
    return Problem(
        tokens=tokens,
        weights=None,
        alpha=None,
        budget=10_000,
        max_epochs=4.0,
        corpus=Path("corpus"),
        model=Path("model"),
        seq_len=64,
        windows=2,
        pipeline="tiny",
        work=Path("work"),
        student=Path("model"),
        target=target or dict.fromkeys(tokens, 1 / len(tokens)),
        proxy=Proxy.model_validate({"model": "parent", "tokens": 512, "learning_rate": 1e-3} | proxy),
        swarm=Swarm(units=count),
        pretrain=Pretrain(tokens=10_000, seq_len=64, batch=4, learning_rate=1e-3),
    )


def law(weights: dict[str, float]) -> dict[str, float]:
    """Losses of which each falls with its domain's own share."""
    return {name: 2 + np.exp(-3 * share) for name, share in weights.items()}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """A stand-in for training, and the mixes that it was given; texts are as their domain is called."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    mixes: list[dict[str, float]] = []

    def train(_setup: units.Setup, *, weights: dict[str, float], **_: Any) -> dict[str, float]:
        mixes.append(weights)
        return law(weights)

    monkeypatch.setattr(units, "train", train)
    monkeypatch.setattr(units, "flops_per_token", lambda *_, **__: 10)
    monkeypatch.setattr(units.Setup, "base", lambda setup: f"base {setup.params.learning_rate}")
    domains = {"names": list(TOKENS)}
    monkeypatch.setattr(units.Setup, "domains", lambda _: {name: f"text {name}" for name in domains["names"]})
    monkeypatch.setattr(swarm, "_text", domains, raising=False)
    return mixes


def test_mixes_are_spread_around_the_prior_within_its_bounds_and_more_begin_with_the_same() -> None:
    drawn = swarm.mixes(PRIOR, count=400, seed=3)
    shares_UD = np.array([[mix[name] for name in PRIOR] for mix in drawn])
    np.testing.assert_allclose(shares_UD.sum(axis=1), 1)
    assert (shares_UD <= 15 * np.array([0.6, 0.3, 0.1]) + 1e-3).all()
    assert ((shares_UD == 0) | (shares_UD >= swarm.LEAST)).all()
    smooth = np.sqrt([0.6, 0.3, 0.1]) / np.sqrt([0.6, 0.3, 0.1]).sum()
    np.testing.assert_allclose(shares_UD.mean(axis=0), smooth, atol=0.06)
    assert len({tuple(mix.values()) for mix in drawn}) == 400
    assert (shares_UD.max(axis=1) > 0.99).mean() > 0.15  # of the smallest strengths
    assert (np.ptp(shares_UD, axis=1) < 0.4).mean() > 0.03  # of the largest
    assert swarm.mixes(PRIOR, count=7, seed=3) == drawn[:7]
    assert swarm.mixes(PRIOR, count=7, seed=4) != drawn[:7]


def test_a_domain_never_has_more_than_fifteen_times_its_prior() -> None:
    rare = {"much": 0.995, "rare": 0.005}
    assert max(mix["rare"] for mix in swarm.mixes(rare, count=200, seed=0)) <= 15 * 0.005 / (1 - swarm.LEAST)


def test_a_killed_swarm_ends_with_the_files_of_one_that_was_not(
    trained: list[dict[str, float]], tmp_path: Path
) -> None:
    def until_the_fifth(function: Callable[[Unit], None], pending: list[Unit]) -> None:
        for unit in pending[:5]:
            function(unit)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swarm.observe(problem(), run=until_the_fifth)
    seen = swarm.observe(problem())
    assert (len(trained), len(seen.weights_UD), seen.evidence["left_out"]) == (12, 12, [])
    files = {path.name: path.read_bytes() for path in Path("runs/tiny/swarm").iterdir()}
    for path in Path("runs/tiny/swarm").iterdir():
        path.unlink()
    again = swarm.observe(problem())
    assert {path.name: path.read_bytes() for path in Path("runs/tiny/swarm").iterdir()} == files
    assert again.evidence == seen.evidence
    np.testing.assert_array_equal(again.weights_UD, seen.weights_UD)


def test_more_units_and_another_target_train_only_what_is_missing(trained: list[dict[str, float]]) -> None:
    swarm.observe(problem(count=8))
    assert len(trained) == 8
    assert len(swarm.observe(problem(count=12)).weights_UD) == 12
    swarm.observe(problem(count=12, target={"a": 1.0}))
    assert len(trained) == 12


def test_another_model_or_other_training_takes_no_unit_and_says_so(
    trained: list[dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    swarm.observe(problem(count=8))
    swarm.observe(problem(count=8, learning_rate=2e-3))
    assert len(trained) == 16
    told = "swarm: 8 units of 2048 tokens to train; 0 are there, and 8 in runs/tiny/swarm are of other models, text"
    assert told in capsys.readouterr().out


def test_a_new_domain_takes_over_the_units_without_it_unless_their_text_changed(
    trained: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm.observe(problem(count=16))
    more = TOKENS | {"d": 1000}
    swarm._text["names"] = list(more)
    seen = swarm.observe(problem(more, count=16))
    assert (len(trained), len(seen.weights_UD)) == (26, 26)  # as many new ones as a law of d takes
    assert (len(seen.of("a")[1]), len(seen.of("d")[1])) == (26, 10)
    assert (seen.weights_UD[:16, 3] == 0).all()
    assert (seen.weights_UD[16:, 3] > 0).any()
    assert len(swarm.observe(problem(more, count=28)).weights_UD) == 28
    assert len(trained) == 28
    monkeypatch.setattr(units.Setup, "domains", lambda _: {name: f"new {name}" for name in more})
    swarm.observe(problem(more, count=16))
    assert len(trained) == 44


def test_a_unit_that_diverges_is_left_out_by_name_and_too_many_are_refused_with_the_number(
    trained: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(most: float) -> None:
        def train(_setup: units.Setup, *, weights: dict[str, float], **_: Any) -> dict[str, float]:
            if weights["a"] > most:
                raise Diverged("the loss is not finite at step 3. Kept: nothing yet. Try a lower rate")
            return law(weights)

        monkeypatch.setattr(units, "train", train)

    some(0.9)
    seen = swarm.observe(problem())
    out = seen.evidence["left_out"]
    assert 0 < len(out) < 5
    assert len(seen.weights_UD) == 12 - len(out)
    assert {each["why"] for each in out} == {"the loss is not finite at step 3"}
    assert all((Path("runs/tiny/swarm") / f"{each['unit']}.json").exists() for each in out)
    some(0.0001)
    with pytest.raises(ValueError, match=r"of 12 units diverged, and \d are left, of which a law over 3 domains ta"):
        swarm.observe(problem(learning_rate=2e-3))


def test_too_few_units_are_refused_with_the_number_and_a_prior_of_zero_by_name(
    trained: list[dict[str, float]],
) -> None:
    with pytest.raises(ValueError, match=r"mixture.swarm.units = 7: a law over 3 domains has 4 constants, and tak"):
        swarm.observe(problem(count=7))
    with pytest.raises(ValueError, match="the prior of b is 0, and its logarithm is taken"):
        swarm.observe(dataclasses.replace(problem(), weights={"a": 1.0, "b": 0.0, "c": 1.0}))
    assert trained == []


def test_cost_counts_every_unit_that_was_trained(trained: list[dict[str, float]]) -> None:
    cost = swarm.observe(problem()).evidence["cost"]
    # 512 tokens are one step of 8 x 256; training reads 10,000 tokens, both at 10 FLOPs a token
    assert cost == {
        "tokens": 12 * 2048, "flops": 12 * 20480, "share_of_training": 2.4576, "flops_share": pytest.approx(2.4576),
    }  # fmt: skip
