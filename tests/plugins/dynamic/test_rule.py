from __future__ import annotations

import decimal
import math
from decimal import Decimal

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tasks.plugins.dynamic import rule

# The worked example of LLaMA-MoE's dynamic selection; the last column is the paper's rule in double precision.
EXAMPLE = {
    "en_cc": (0.67, 1.6916865110397339, 1.728, 0.668204),
    "en_c4": (0.15, 2.074881076812744, 2.117, 0.150469),
    "github": (0.045, 0.6984495520591736, 0.705, 0.043563),
    "en_wikipedia": (0.045, 1.5899001359939575, 1.572, 0.043279),
    "en_book": (0.045, 1.925248146057129, 2.071, 0.050070),
    "en_arxiv": (0.025, 1.2408167123794556, 1.287, 0.025180),
    "en_stack": (0.02, 1.4974864721298218, 1.491, 0.019235),
}


def test_one_update_gives_the_published_example() -> None:
    prior, reference, loss, expected = ({d: row[i] for d, row in EXAMPLE.items()} for i in range(4))
    result = rule.update(prior, losses=loss, references=reference)
    assert result == pytest.approx(expected, abs=1e-6)
    assert math.fsum(result.values()) == pytest.approx(1)


def test_one_update_by_the_code_rule_gives_what_the_published_code_computes_in_single_precision() -> None:
    prior, reference, loss, _ = ({d: row[i] for d, row in EXAMPLE.items()} for i in range(4))
    w = torch.tensor([*prior.values()])
    difference = torch.tensor([loss[d] - reference[d] for d in EXAMPLE])
    alpha = torch.softmax(torch.log(w) + difference, dim=0)
    published = ((1 - 1e-4) * alpha + 1e-4 / len(EXAMPLE)).double()
    published = dict(zip(EXAMPLE, (published / published.sum()).tolist(), strict=True))
    result = rule.update(prior, losses=loss, references=reference, rule="code")
    assert result == pytest.approx(published, abs=1e-6)
    assert result["en_wikipedia"] < rule.update(prior, losses=loss, references=reference)["en_wikipedia"]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.one_of(st.just(0.0), st.floats(1e-12, 1e6)), st.floats(-800, 800)), min_size=1, max_size=12
    ).filter(lambda rows: any(weight for weight, _ in rows)),
)
def test_both_rules_agree_with_fifty_digits_however_large_the_excess(
    rows: list[tuple[float, float]],
) -> None:
    prior = {f"d{i}": weight for i, (weight, _) in enumerate(rows)}
    losses = {f"d{i}": excess for i, (_, excess) in enumerate(rows)}
    zeros = dict.fromkeys(prior, 0.0)
    paper = rule.update(prior, losses=losses, references=zeros, rule="paper")
    code = rule.update(prior, losses=losses, references=zeros, rule="code")
    with decimal.localcontext(prec=50):
        for result, clip, smooth in ((paper, True, Decimal(0)), (code, False, Decimal("1e-4"))):
            exact = {d: Decimal(w) * Decimal(max(losses[d], 0) if clip else losses[d]).exp() for d, w in prior.items()}
            total = sum(exact.values())
            for domain, value in exact.items():
                expected = float((1 - smooth) * value / total + smooth / len(exact))
                assert result[domain] == pytest.approx(expected, rel=1e-9, abs=1e-300)
            assert math.fsum(result.values()) == pytest.approx(1)
    for domain, weight in prior.items():
        assert weight or paper[domain] == 0
        assert weight or code[domain] == pytest.approx(1e-4 / len(prior))


def test_a_domain_without_weight_does_not_decide_the_scale_of_the_others() -> None:
    result = rule.update({"a": 0.0, "b": 1.0}, losses={"a": 5000.0, "b": 1.0}, references={"a": 1.0, "b": 1.0})
    assert result == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize("bad", [{"a": 0.0}, {"a": -1.0, "b": 2.0}, {"a": math.inf}, {"a": math.nan}])
def test_an_update_of_weights_that_name_no_mixture_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive sum"):
        rule.update(bad, losses=dict.fromkeys(bad, 1.0), references=dict.fromkeys(bad, 1.0))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused_by_name(loss: float) -> None:
    with pytest.raises(ValueError, match=r"losses: no finite number for b"):
        rule.update({"a": 1, "b": 1}, losses={"a": 1, "b": loss}, references={"a": 1, "b": 1})
    with pytest.raises(ValueError, match=r"references: no finite number for b"):
        rule.update({"a": 1, "b": 1}, losses={"a": 1, "b": 1}, references={"a": 1})


@given(
    start=st.lists(st.floats(0.01, 1), min_size=1, max_size=8),
    moved=st.lists(st.floats(0, 1), min_size=8, max_size=8),
    factor=st.floats(1, 100),
)
@example(start=[0.25, 1.0], moved=[1.0, *[0.0] * 7], factor=2.0)  # a weight of 0 that has to rise
def test_weights_held_within_a_factor_of_the_start_keep_the_proportions_of_the_free_ones(
    start: list[float], moved: list[float], factor: float
) -> None:
    begin = {str(i): share / sum(start) for i, share in enumerate(start)}
    total = sum(moved[: len(start)])
    assume(total > 1e-3)
    now = {str(i): share / total for i, share in enumerate(moved[: len(start)])}
    held = rule.within(now, start=begin, factor=factor)
    assert sum(held.values()) == pytest.approx(1)
    scales = []
    for domain, weight in held.items():
        low, high = begin[domain] / factor, begin[domain] * factor
        assert low * (1 - 1e-9) <= weight <= high * (1 + 1e-9)
        if low * 1.001 < weight < high * 0.999:
            scales.append(weight / max(now[domain], 1e-300))  # what 0 counts as
    assert max(scales, default=1) == pytest.approx(min(scales, default=1), rel=1e-6)


def test_weights_within_the_factor_are_left_as_they_are() -> None:
    now = {"a": 0.4, "b": 0.35, "c": 0.25, "out": 0.0}
    start = {"a": 0.3, "b": 0.3, "c": 0.4, "out": 0.0}
    assert rule.within(now, start=start, factor=4.0) == pytest.approx(now)
