"""The hard concrete distribution against the formulas of the paper, and its limits."""

from __future__ import annotations

import math

import pytest
import torch

from tasks.plugins.masks import hard_concrete


def test_at_its_upper_limit_a_mask_has_the_probability_and_the_factor_of_the_reference_figures() -> None:
    limit = torch.tensor(math.log(100), dtype=torch.float64)
    assert hard_concrete.absent(limit).item() == pytest.approx(0.00202, abs=5e-6)
    assert hard_concrete.factor(limit).item() == pytest.approx(0.99603, abs=5e-6)
    assert pytest.approx(limit.item()) == hard_concrete.LARGEST


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_samples_are_zero_as_often_as_the_closed_form_says(logit: float) -> None:
    torch.manual_seed(0)
    drawn = hard_concrete.sample(torch.full((200_000,), logit))
    expected = hard_concrete.absent(torch.tensor(logit)).item()
    assert (drawn == 0).double().mean().item() == pytest.approx(expected, abs=5e-3)
    assert drawn.min() == 0
    assert drawn.max() == 1
    assert ((drawn > 0) & (drawn < 1)).any()


def test_a_gradient_passes_between_the_limits_and_at_them_only_back_inside() -> None:
    logits = torch.tensor([9.0, 9.0, 0.0, 0.0, -9.0, -9.0], requires_grad=True)
    bounded = hard_concrete.bounded(logits)
    high, low = hard_concrete.LARGEST, hard_concrete.SMALLEST
    assert bounded.tolist() == pytest.approx([high, high, 0, 0, low, low])
    bounded.backward(torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]))  # a step goes against it
    assert logits.grad is not None
    assert logits.grad.tolist() == [1.0, 0.0, 1.0, -1.0, 0.0, -1.0]
