from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasks.plugins.proxy_runs import rules

THIRDS = dict.fromkeys("abc", 1 / 3)
EXCESS = {"a": 0.5, "b": 0.1, "c": 0.0}  # the third is -.2, clipped


def test_a_step_of_doremi_gives_the_golden_numbers() -> None:
    once = rules.doremi(THIRDS, excess=EXCESS)
    assert [round(weight, 6) for weight in once.values()] == [0.439097, 0.294446, 0.266457]
    by_hand = np.array([*once.values()]) * np.exp([0.5, 0.1, 0.0])
    by_hand = 0.999 * by_hand / by_hand.sum() + 0.001 / 3
    assert [*rules.doremi(once, excess=EXCESS).values()] == pytest.approx(by_hand.tolist(), abs=1e-12)


def test_a_step_of_doremi_agrees_with_the_softmax_of_the_repository() -> None:
    weights = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    score = torch.tensor([0.03, 1.2, 0.4], dtype=torch.float64)
    published = (1 - 1e-3) * torch.softmax(weights.log() + score, dim=0) + 1e-3 / 3
    ours = rules.doremi(
        dict(zip("abc", weights.tolist(), strict=True)), excess=dict(zip("abc", score.tolist(), strict=True))
    )
    assert [*ours.values()] == pytest.approx(published.tolist(), abs=1e-12)


def test_doremi_keeps_every_domain_alive_however_long_one_lags() -> None:
    weights = dict(THIRDS)
    for _ in range(500):
        weights = rules.doremi(weights, excess={"a": 2000.0, "b": 0.0, "c": 0.0})
    assert weights["a"] == pytest.approx(1, abs=1e-3)
    assert min(weights.values()) >= rules.SMOOTHING / 3
    assert rules.doremi(weights, excess={"a": 0.0, "b": 5.0, "c": 0.0})["b"] > 0.04  # it comes back in a few steps


def test_a_step_of_doge_follows_the_gradient_products_without_their_diagonal() -> None:
    gradients = np.array([[1.0, 2.0, -0.5], [0.5, 1.0, 0.25], [-1.0, 0.2, 3.0]])
    products = gradients @ gradients.T
    norms = np.linalg.norm(gradients, axis=1)
    rate, mu = 5e-4, 0.01
    score = rate * (products.sum(1) - np.diag(products)) / norms.mean()
    assert score.min() < 0 < score.max()
    score = np.clip(score, 0, 5 * rate)
    weights = np.array([0.2, 0.5, 0.3])
    expected = weights * np.exp(score / mu)
    ours = rules.doge(
        dict(zip("abc", weights.tolist(), strict=True)),
        gains=dict(zip("abc", rules.gains(products).tolist(), strict=True)),
        norms=dict(zip("abc", norms.tolist(), strict=True)),
        rate=rate,
        mu=mu,
    )
    assert [*ours.values()] == pytest.approx((expected / expected.sum()).tolist(), abs=1e-8)


def test_a_domain_without_a_gradient_keeps_its_weight_beside_others_that_gain_nothing() -> None:
    kept = rules.doge(THIRDS, gains={"a": -3.0, "b": -1.0}, norms={"a": 1.0, "b": 1.0}, rate=1e-3)
    assert kept == pytest.approx(THIRDS)


def test_the_effects_of_single_domains_are_solved_from_the_sweeps() -> None:
    truth = np.array([[0.9, 0.1, -0.2], [0.0, 0.5, 0.1]])  # two targets, three domains
    mixes = [[*rules.smoothed_one_hot("abc", on=domain).values()] for domain in "abc"]
    assert mixes[0] == pytest.approx([0.625, 0.1875, 0.1875])
    drops = np.array([[np.dot(mix, row) for mix in mixes] for row in truth])
    assert rules.effects(drops) == pytest.approx(truth)


def test_an_update_of_aioli_shifts_normalises_and_moves_by_the_column_sums() -> None:
    effects = np.array([[0.9, 0.1, -0.2], [0.0, 0.5, 0.1], [0.1, 0.0, 0.3]])
    shifted = effects + 0.2
    columns = (shifted / shifted.sum()).sum(0)
    expected = np.array([0.2, 0.5, 0.3]) * np.exp(0.2 * columns)
    ours = rules.aioli({"a": 0.2, "b": 0.5, "c": 0.3}, effects_TD=effects)
    assert [*ours.values()] == pytest.approx((expected / expected.sum()).tolist(), abs=1e-12)
    positive = np.array([[0.9, 0.1, 0.2]])
    moved = np.exp(0.2 * positive[0] / positive.sum())
    assert [*rules.aioli(THIRDS, effects_TD=positive).values()] == pytest.approx((moved / moved.sum()).tolist())


def test_aioli_follows_the_target_that_matters_and_stays_where_nothing_has_an_effect() -> None:
    effects = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    first = rules.aioli(THIRDS, effects_TD=effects, importance_T=[1.0, 0.0])
    assert first["a"] > first["b"] == first["c"]
    assert rules.aioli(THIRDS, effects_TD=np.zeros((3, 3))) == pytest.approx(THIRDS)


@pytest.mark.parametrize("rule", ["doremi", "doge", "aioli"])
def test_a_number_that_is_not_finite_is_refused(rule: str) -> None:
    bad = {"a": math.nan, "b": 0.0, "c": 0.0}
    call: dict[str, Callable[[], object]] = {
        "doremi": lambda: rules.doremi(THIRDS, excess=bad),
        "doge": lambda: rules.doge(THIRDS, gains=bad, norms=THIRDS, rate=1e-3),
        "aioli": lambda: rules.aioli(THIRDS, effects_TD=np.array([[math.nan, 0.0, 0.0]])),
    }
    with pytest.raises(ValueError, match="finite"):
        call[rule]()


def test_doremi_prefers_what_can_be_learned_to_what_is_easy_and_both_to_noise() -> None:
    """Three logistic regressions, as in levanter's test of DoReMi (tests/test_doremi.py)."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.tensor([[0.0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]])  # learnable, easy, noise
    truth = torch.tensor([[0.0, 0.5, 0.5, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    spread, offset = torch.tensor([0.1, 0.05, 2.0]), torch.tensor([0.0, 1.0, 0.0])

    def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        domain_B = torch.randint(3, (32,), generator=generator)
        x_BF = (torch.randn(32, 5, generator=generator) + offset[domain_B, None]) * masks[domain_B]
        logit_B = (x_BF * truth[domain_B]).sum(1) + torch.randn(32, generator=generator) * spread[domain_B]
        return domain_B, x_BF, (logit_B > 0).float()

    def model() -> torch.nn.Linear:
        torch.manual_seed(1)
        return torch.nn.Linear(5, 1)

    def nats(of: torch.nn.Linear, x_BF: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(of(x_BF)[:, 0], y_B, reduction="none")

    reference, proxy = model(), model()
    adam = torch.optim.Adam(reference.parameters(), lr=1e-2)
    for _ in range(300):
        _, x_BF, y_B = draw()
        adam.zero_grad()
        nats(reference, x_BF, y_B).mean().backward()
        adam.step()
    names = ["learnable", "easy", "noise"]
    weights, scores = dict.fromkeys(names, 1 / 3), dict.fromkeys(names, math.log(2))
    total = dict.fromkeys(names, 0.0)
    adam = torch.optim.Adam(proxy.parameters(), lr=1e-2)
    for _ in range(300):
        domain_B, x_BF, y_B = draw()
        nats_B = nats(proxy, x_BF, y_B)
        excess_B = (nats_B - nats(reference, x_BF, y_B)).clamp(min=0).detach()
        scores |= {
            name: float(excess_B[domain_B == i].mean()) for i, name in enumerate(names) if (domain_B == i).any()
        }
        weights = rules.doremi(weights, excess=scores)
        weight_B = torch.tensor([*weights.values()])[domain_B]
        adam.zero_grad()
        ((weight_B * nats_B).sum() / weight_B.sum()).backward()  # not clipped
        adam.step()
        total = {name: total[name] + weights[name] for name in names}
    mean = {name: value / 300 for name, value in total.items()}
    assert mean["learnable"] > mean["easy"] > mean["noise"]
    assert mean["noise"] < 0.05
