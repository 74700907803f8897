from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tasks.mixture import repetition

TOKENS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 10**9), min_size=1)


def unimax(tokens: dict[str, int], *, budget: int, max_epochs: float) -> dict[str, float]:
    """Algorithm 1 of arXiv 2304.09151: the smallest first, each an even share of what is left, or its cap."""
    left, shares = float(budget), {}
    for i, domain in enumerate(sorted(tokens, key=lambda name: tokens[name])):
        shares[domain] = min(left / (len(tokens) - i), max_epochs * tokens[domain])
        left -= shares[domain]
    return {domain: share / sum(shares.values()) for domain, share in shares.items()}


@given(tokens=TOKENS, budget=st.integers(1, 10**10), max_epochs=st.floats(0.5, 8))
def test_equal_shares_under_a_cap_are_those_of_unimax(tokens: dict[str, int], budget: int, max_epochs: float) -> None:
    assume(max_epochs * sum(tokens.values()) >= budget)
    equal = dict.fromkeys(tokens, 1 / len(tokens))
    weights, _ = repetition.capped(equal, tokens=tokens, budget=budget, max_epochs=max_epochs)
    assert weights == pytest.approx(unimax(tokens, budget=budget, max_epochs=max_epochs), rel=1e-6)


@given(
    tokens=TOKENS,
    raw=st.lists(st.just(0.0) | st.floats(1e-6, 1), min_size=8, max_size=8),
    budget=st.integers(1, 10**10),
)
def test_no_domain_is_repeated_more_often_and_the_others_keep_their_proportions(
    tokens: dict[str, int], raw: list[float], budget: int
) -> None:
    given_weights = dict(zip(tokens, raw, strict=False))
    total = sum(given_weights.values())
    assume(total > 1e-3)
    given_weights = {domain: weight / total for domain, weight in given_weights.items()}
    assume(4 * sum(tokens[d] for d, weight in given_weights.items() if weight > 0) >= budget)
    weights, bound = repetition.capped(given_weights, tokens=tokens, budget=budget, max_epochs=4)
    assert sum(weights.values()) == pytest.approx(1)
    for domain, weight in weights.items():
        assert weight * budget <= 4 * tokens[domain] * (1 + 1e-6) + 1e-6
        assert (weight == 0) == (given_weights[domain] == 0)
    free = [domain for domain in weights if domain not in bound and weights[domain] > 0]
    scales = [weights[domain] / given_weights[domain] for domain in free]
    assert max(scales, default=1) == pytest.approx(min(scales, default=1))


def test_a_budget_that_no_weights_can_keep_is_refused_with_the_epochs_that_it_takes() -> None:
    with pytest.raises(ValueError, match=r"pretrain.tokens = 1000 are 10 epochs of the 100 training tokens of a, b;"):
        repetition.capped(
            {"a": 0.5, "b": 0.5, "c": 0.0}, tokens={"a": 40, "b": 60, "c": 999}, budget=1000, max_epochs=4
        )


def test_a_cap_that_binds_is_named() -> None:
    weights, bound = repetition.capped(
        {"a": 0.5, "b": 0.25, "c": 0.25}, tokens={"a": 10, "b": 100, "c": 100}, budget=100, max_epochs=1
    )
    assert bound == ["a"]
    assert weights == pytest.approx({"a": 0.1, "b": 0.45, "c": 0.45})
