"""Liger's loss in the place of the logits against the stock loss; run by test_fused_loss.py in the interpreter."""

import pytest
import torch

from tasks.corpus.sampling.loader import IGNORED
from tasks.pretrain.loss import fused_loss
from tests.pretrain.loss.test_objective import FAMILIES, LENGTH, WINDOWS, build, packed, run


def losses_and_gradients(family: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    monkeypatch.setattr(fused_loss, "available", lambda device: fused)
    model = build(family)
    if "granite" in family:
        model.config.logits_scaling = 4.0
    loss_B, balance = run(model, packed(WINDOWS, masked=True), balance=True)
    (loss_B @ torch.tensor([0.3, 1.7]) + 0.01 * balance).backward()
    assert "forward" not in vars(model.get_output_embeddings())
    return [loss_B.detach(), balance.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = losses_and_gradients(family, False, monkeypatch)
    fused = losses_and_gradients(family, True, monkeypatch)
    assert len(stock) == len(fused) > 10
    for got, expected in zip(fused, stock, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_no_tensor_of_all_logits_exists() -> None:
    model = build("mixtral")
    vocabulary = model.config.vocab_size
    target_BL = torch.full((2, LENGTH), IGNORED)
    with fused_loss.in_place_of_logits(model, target_BL, ignored=IGNORED):
        out = model(input_ids=torch.zeros(2, LENGTH, dtype=torch.long))
    assert out.logits.shape == (2, LENGTH, 1) != (2, LENGTH, vocabulary)
    assert (out.logits == 0).all()
