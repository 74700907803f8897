"""The laws of regmix and olmix, on swarms whose losses are known in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.mixture import methods
from tasks.mixture.problem import Problem
from tasks.plugins.olmix import estimator as olmix
from tasks.plugins.proxy_runs import evidence, swarm
from tasks.plugins.proxy_runs.swarm import Observed
from tasks.plugins.regmix import estimator as regmix

DOMAINS = ["prose", "code", "noise", "copy"]
TOKENS = dict.fromkeys(DOMAINS, 1000)
FLOOR = np.log([1.5, 1.0, 6.0])
SLOPES = np.array(
    [
        [-2.0, 0.2, 0.8, -1.9],  # prose, of which copy is a copy
        [0.1, -2.5, 0.8, 0.1],
        [0.02, 0.02, -0.05, 0.02],  # shuffled tokens: little is to be learnt
    ]
)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bootstrap fits and simulated mixes, for time."""
    monkeypatch.setattr(olmix, "BOOTSTRAPS", 4)
    monkeypatch.setattr(regmix, "BOOTSTRAPS", 3)
    monkeypatch.setattr(regmix, "SIMULATED", 20_000)


def losses(weights_UD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of prose, code and noise, [U, 3]."""
    return np.exp(FLOOR) + np.exp(weights_UD @ SLOPES.T)


def observed(count: int, *, seed: int = 0, error: float = 0.005) -> Observed:
    """A swarm whose losses are the law's, with an error of measurement in nats; copy's are prose's."""
    mixes = swarm.mixes(dict.fromkeys(DOMAINS, 0.25), count=count, seed=seed)
    weights_UD = np.array([[mix[domain] for domain in DOMAINS] for mix in mixes])
    known = losses(weights_UD) + np.random.default_rng(seed).normal(0, error, (count, 3))
    return Observed(
        domains=DOMAINS,
        weights_UD=weights_UD,
        losses=dict(zip(DOMAINS, [*known.T, known[:, 0].copy()], strict=True)),
        evidence={"units": [], "left_out": [], "cost": {}},
    )


def problem(*, budget: int = 1000, target: dict[str, float] | None = None) -> Problem:
    return Problem(
        tokens=TOKENS,
        weights=None,
        alpha=None,
        budget=budget,
        max_epochs=4.0,
        corpus=Path("corpus"),
        model=Path("model"),
        seq_len=64,
        windows=2,
        target=target or dict.fromkeys(DOMAINS, 0.25),
    )


def test_the_log_linear_law_is_found_again_from_its_losses() -> None:
    seen = observed(40, error=0.0)
    for i, domain in enumerate(DOMAINS[:3]):
        law = olmix.fit(*seen.of(domain))
        fresh_UD = np.random.default_rng(1).dirichlet(np.ones(4), 50)
        np.testing.assert_allclose(law(fresh_UD), losses(fresh_UD)[:, i], atol=2e-3)


def test_an_outlier_moves_the_law_little() -> None:
    weights_UD, losses_U = observed(40, error=0.0).of("code")
    losses_U = losses_U.copy()
    losses_U[7] += 3.0
    fresh_UD = np.random.default_rng(1).dirichlet(np.ones(4), 50)
    np.testing.assert_allclose(olmix.fit(weights_UD, losses_U)(fresh_UD), losses(fresh_UD)[:, 1], atol=0.05)


def test_the_proposal_is_the_best_of_all_mixes_of_a_fine_grid() -> None:
    laws = {"one": olmix.Law(np.array([0.0, -2.0, 0.3, 0.5])), "two": olmix.Law(np.array([0.0, 0.2, -1.0, 0.4]))}
    prior_D, caps_D = np.array([0.5, 0.3, 0.2]), np.array([0.55, 1.0, 1.0])
    found_D = olmix.propose(laws, target={"one": 0.6, "two": 0.4}, prior_D=prior_D, caps_D=caps_D)
    grid = np.array([[i, j, 200 - i - j] for i in range(201) for j in range(201 - i)]) / 200
    grid = grid[grid[:, 0] <= 0.55]
    divergence = np.where(grid > 0, grid * np.log(np.maximum(grid, 1e-12) / prior_D), 0).sum(axis=1)
    value = 0.6 * laws["one"](grid) + 0.4 * laws["two"](grid) + olmix.KAPPA * divergence
    np.testing.assert_allclose(found_D, grid[value.argmin()], atol=0.01)
    assert found_D[0] <= 0.55 + 1e-6


def test_a_strong_pull_gives_the_prior_and_caps_below_one_are_refused() -> None:
    laws = {"one": olmix.Law(np.array([0.0, -2.0, 0.3]))}
    prior_D = np.array([0.7, 0.3])
    near_D = olmix.propose(laws, target={"one": 1.0}, prior_D=prior_D, caps_D=np.ones(2), kappa=1e3)
    np.testing.assert_allclose(near_D, prior_D, atol=1e-3)
    with pytest.raises(ValueError, match=r"the caps on repetition sum to 0\.500"):
        olmix.propose(laws, target={"one": 1.0}, prior_D=prior_D, caps_D=np.array([0.2, 0.3]))


@pytest.mark.parametrize("module", [olmix, regmix])
def test_shuffled_tokens_get_less_than_half_of_a_uniform_share_and_the_ranks_are_right(module) -> None:
    seen = observed(64)
    mix_D, figures = module.solve(problem(), seen)
    weights = dict(zip(DOMAINS, mix_D, strict=True))
    assert weights["noise"] < 0.125
    assert weights["code"] > 0.15
    assert weights["prose"] + weights["copy"] > 0.25
    assert sum(weights.values()) == pytest.approx(1)
    assert figures["fit"]["spearman"] > 0.85
    assert len(figures["fit"]["predicted"]) == len(figures["fit"]["measured"]) == figures["fit"]["units"] == 64
    assert (figures["spread"].keys(), figures["spread_over"]) == (set(DOMAINS), "bootstrap")
    assert figures["spread"]["noise"] < 0.1


def test_the_same_swarm_gives_the_same_proposal() -> None:
    seen = observed(24)
    first, again = (olmix.solve(problem(), seen) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]


def test_a_target_domain_draws_its_weight_and_a_cap_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm, "observe", lambda _: observed(48))
    for method in ("olmix", "regmix"):
        free = methods.estimate(method, problem(target={"code": 1.0}))
        assert free.weights["code"] > 0.6
        capped = methods.estimate(method, problem(target={"code": 1.0}, budget=10_000))
        assert 0.3 < capped.weights["code"] <= 0.4 + 1e-6
        assert max(capped.evidence["epochs"].values()) <= 4 + 1e-6


def test_a_missing_package_is_told_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence.importlib.util, "find_spec", lambda _: None)
    for method, package in (("olmix", "cvxpy"), ("regmix", "lightgbm")):
        with pytest.raises(ValueError, match=rf"'{method}' needs {package}: pip install 'moeforge\[mixture\]'"):
            methods.estimate(method, problem())


def test_a_loss_that_older_units_have_not_is_fitted_to_the_others() -> None:
    seen = observed(48)
    seen.losses["copy"][:20] = np.nan
    assert [len(seen.of(domain)[1]) for domain in DOMAINS] == [48, 48, 48, 28]
    for module in (olmix, regmix):
        mix_D, figures = module.solve(problem(), seen)
        assert np.isfinite(mix_D).all()
        assert figures["fit"]["units"] == 28


def test_every_held_out_prediction_is_of_a_fit_that_has_not_seen_the_unit() -> None:
    weights_UD, losses_U = observed(20).of("code")

    def memory(known_UD: NDArray[np.float64], _: NDArray[np.float64]) -> evidence.Law:
        return lambda mixes_UD: np.array([(mix == known_UD).all(axis=1).any() for mix in mixes_UD], dtype=float)

    assert not evidence.held_out(memory, weights_UD, losses_U, seed=0).any()
    assert evidence.spearman(np.ones(5), np.arange(5.0)) is None


def test_boosting_is_stopped_by_units_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setattr(regmix, "boosted", lambda x, y, *, stop: given.update(fit=y, stop=stop[1]))
    regmix.fit(np.zeros((50, 2)), np.arange(50.0))
    assert sorted([*given["fit"], *given["stop"]]) == list(range(50))
    assert len(given["stop"]) == 10
