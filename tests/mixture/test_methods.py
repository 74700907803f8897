from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import settings
from tasks.mixture import methods

DOMAINS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 10**12), min_size=1)


def problem(
    tokens: dict[str, int], weights: dict[str, float] | None = None, *, alpha: float | None = None, budget: int = 1
) -> methods.Problem:
    return methods.Problem(
        tokens=tokens,
        weights=weights,
        alpha=alpha,
        budget=budget,
        max_epochs=4.0,
        corpus=Path("corpus"),
        model=Path("model"),
        seq_len=64,
        windows=2,
    )


@given(tokens=DOMAINS)
def test_proportional_weights_pass_every_domain_equally_often(tokens: dict[str, int]) -> None:
    weights = methods.estimate("proportional", problem(tokens)).weights
    assert sum(weights.values()) == pytest.approx(1)
    passes = [weights[domain] / tokens[domain] for domain in tokens]
    assert max(passes) == pytest.approx(min(passes))


@given(tokens=DOMAINS)
def test_uniform_weights_are_equal_and_sum_to_one(tokens: dict[str, int]) -> None:
    weights = methods.estimate("uniform", problem(tokens)).weights
    assert weights == dict.fromkeys(tokens, pytest.approx(1 / len(tokens)))


@given(tokens=DOMAINS)
def test_temperature_goes_from_uniform_to_proportional(tokens: dict[str, int]) -> None:
    ends = {alpha: methods.estimate("temperature", problem(tokens, alpha=alpha)).weights for alpha in (0.0, 1.0)}
    assert ends[0.0] == pytest.approx(methods.estimate("uniform", problem(tokens)).weights)
    assert ends[1.0] == pytest.approx(methods.estimate("proportional", problem(tokens)).weights)


def test_a_cap_on_repetition_holds_for_every_method_and_stands_in_the_evidence() -> None:
    estimate = methods.estimate("explicit", problem({"a": 10, "b": 1000}, {"a": 1, "b": 1}, budget=100))
    assert estimate.weights == pytest.approx({"a": 0.4, "b": 0.6})
    assert estimate.evidence["capped"] == {"a": 0.5}
    assert estimate.evidence["epochs"] == pytest.approx({"a": 4.0, "b": 0.06})


def test_explicit_weights_are_normalised_and_may_be_zero() -> None:
    weights = methods.estimate("explicit", problem({"a": 5, "b": 5, "c": 5}, {"a": 3, "b": 1, "c": 0})).weights
    assert weights == {"a": 0.75, "b": 0.25, "c": 0}


@pytest.mark.parametrize("method", ["explicit", "reference_loss"])
def test_weights_for_other_domains_than_the_corpus_has_are_refused_by_name(method: str) -> None:
    with pytest.raises(ValueError, match=r"missing: b; not in the corpus: x") as error:
        methods.estimate(method, problem({"a": 1, "b": 2}, {"a": 1.0, "x": 1.0}))
    assert "weight 0" in str(error.value)


def test_an_unknown_method_lists_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="'skill' is not known; known: uniform, proportional"):
        methods.estimate("skill", problem({"a": 1}))


def test_every_registered_method_can_be_set() -> None:
    allowed = get_args(settings.Mixture.model_fields["method"].annotation)
    assert set(allowed) >= set(methods.ESTIMATORS)


def test_an_estimator_is_added_by_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "ESTIMATORS", dict(methods.ESTIMATORS))

    @methods.estimator("root")
    def root(problem: methods.Problem) -> methods.Estimate:
        return methods.Estimate(weights={domain: tokens**0.5 for domain, tokens in problem.tokens.items()})

    assert methods.estimate("root", problem({"a": 1, "b": 9})).weights == {"a": 0.25, "b": 0.75}
