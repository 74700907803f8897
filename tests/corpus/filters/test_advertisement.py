"""Advertisements go by the density and the kinds of their signs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.filters.advertisement import _KINDS, signs
from tasks.corpus.filters.chain import build
from tasks.settings.filters import Advertisement
from tests.corpus.filters.samples import PROSE, document

RULE = Advertisement(rule="advertisement")


def verdict(text: str, rule: Advertisement = RULE) -> str | None:
    return build([rule])(document(text))


@pytest.mark.parametrize(
    "text",
    [
        "Limited time offer! Buy one today for only $19.99 and get free shipping. Call now: 1-800-555-0199.",
        "Earn extra income from home. Click here to join now. 100% satisfaction guaranteed or your money back.",
        "Congratulations, you have won a prize of £500! To claim your gift card call 0800 555 0199 today.",
    ],
)
def test_an_advertisement_is_dropped(text: str) -> None:
    assert verdict(text) == "advertisement.selling"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Oil rose to $71.20 a barrel on Monday, from $69.95 on Friday, and gold to $2,400; copper fell below $4.",
        "You can call us any time at our house, and the door is free of any lock; offer what you like to the guests.",
        "See http://example.org/a, http://example.org/b and www.example.org; to unsubscribe from the list, write.",
        "The reader calls the buffer, and now orders its bytes. Call free() when you are done with it.",
    ],
)
def test_what_only_looks_a_little_like_one_is_kept(text: str) -> None:
    assert verdict(text) is None


def test_manuals_sell_nothing() -> None:
    assert {verdict(text) for text in PROSE} == {None}


def test_signs_are_counted_by_kind_at_the_starts_of_words_in_any_case() -> None:
    result = signs(
        "BUY NOW! Save 50% on $5 mugs and 20 dollars jugs, half price. Presale: rebuy now. Call +44 20 7946 0018."
    )
    assert result == {"action": 1, "reduction": 2, "price": 2, "phone": 1}


EXAMPLES = {
    "price": "$ 1,299.00",
    "reduction": "coupon",
    "phone": "tel: (020) 7946 0018",
    "link": "visit our",
    "action": "order yours now",
    "free": "risk-free",
    "guarantee": "money-back",
    "offer": "while supplies last",
    "gain": "work from home",
}


@pytest.mark.parametrize("kind", _KINDS)
def test_every_kind_has_a_sign(kind: str) -> None:
    assert signs(f"So {EXAMPLES[kind]} it is") == {kind: 1}


def test_both_knobs_are_heard() -> None:
    text = "It costs $5, or $9 with a coupon. " + "And so on it went. " * 100
    assert verdict(text) is None
    assert verdict(text, Advertisement(rule="advertisement", max_per_100_words=0.1)) == "advertisement.selling"
    assert verdict(text, Advertisement(rule="advertisement", max_per_100_words=0.1, min_kinds=3)) is None


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["1,", "call (", "buy ", "8", "save ", "$1.", "free ", "- "]), st.sampled_from(["", "x", " now"])
)
def test_long_runs_take_time_in_proportion(unit: str, end: str) -> None:
    """A pattern that looked again at what it had seen would not end."""
    assert signs(unit * 20_000 + end).total() <= 20_001
