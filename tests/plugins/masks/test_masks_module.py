"""Masks and their Lagrangian, by hand in float64 and on a tiny model."""

from __future__ import annotations

import pytest
import torch

from tasks.plugins.masks import hard_concrete, module
from tests import models

SIZES = {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 48, "hidden_size": 32}
SHAPE = {"num_hidden_layers": 2, "num_key_value_heads": 1, "intermediate_size": 12, "hidden_size": 24}


def masks(**shape: int) -> module.Masks:
    torch.manual_seed(0)
    return module.Masks(SIZES, SHAPE | shape, ramp=10)


def test_only_what_the_shape_cuts_has_masks_one_for_each_unit() -> None:
    made = masks()
    assert {name: list(value.shape) for name, value in made.named_parameters()} == {
        "group_LK": [2, 2],
        "neuron_LN": [2, 48],
        "hidden_D": [32],
        "multipliers": [3, 2],
    }
    assert list(masks(num_hidden_layers=1).layer_L.shape) == [2]


def test_the_lagrangian_is_the_papers_and_its_multipliers_climb_where_all_else_descends() -> None:
    made = masks()
    made.begin(4)  # 4 of 10 steps of the ramp
    with torch.no_grad():
        for name in made.targets:
            getattr(made, name).copy_(torch.randn(getattr(made, name).shape))
        made.multipliers.copy_(torch.tensor([[0.5, 2.0], [-1.0, 3.0], [0.25, 1.0]]))
    made.draw()
    expected, excess = 0.0, {}
    for (name, share), (linear, square) in zip(made.targets.items(), made.multipliers.tolist(), strict=True):
        cut = torch.sigmoid(torch.tensor(1 / 11).double().log() * 2 / 3 - getattr(made, name).detach().double())
        excess[name] = cut.mean(-1) - 0.4 * share
        square = made.penalty + module.PACE * square
        expected += float((module.PACE * linear * excess[name] + square * excess[name] ** 2).mean())
    assert made.targets == {"group_LK": 0.5, "neuron_LN": 0.75, "hidden_D": 0.25}
    assert made.lagrangian.item() == pytest.approx(expected, rel=1e-5)
    made.lagrangian.backward()
    assert made.multipliers.grad is not None
    for got, name in zip(made.multipliers.grad, made.targets, strict=True):
        wanted = [-module.PACE * float(excess[name].mean()), -module.PACE * float((excess[name] ** 2).mean())]
        assert got.tolist() == pytest.approx(wanted, rel=1e-4)


def test_the_targets_grow_over_the_ramp_and_stay() -> None:
    made = masks()
    shares, penalties = [], []
    for step in (1, 5, 10, 25, 50, 400):
        made.begin(step)
        shares.append(made.progress)
        penalties.append(made.penalty)
    assert shares == [0.1, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert penalties[3:] == pytest.approx([module.PENALTY * module.GROWTH**share for share in (0.5, 1, 1)])
    assert (module.ramp(100), module.ramp(3)) == (20, 1)


def test_in_training_masks_are_drawn_and_in_evaluation_those_stay_that_the_target_keeps() -> None:
    model = models.build("llama")
    made = module.install(model, SHAPE, ramp=10)
    assert module.of(model) is made
    ids = torch.arange(12)[None]
    model.train()
    torch.manual_seed(1)
    first, second = model(input_ids=ids).logits, model(input_ids=ids).logits
    assert not torch.equal(first, second)
    assert made.lagrangian.requires_grad
    model.eval()
    made.begin(10)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert made.keep.layer_L is None
    for name, count in (("group_LK", 1), ("neuron_LN", 12), ("hidden_D", 24)):
        mask, logits = getattr(made.keep, name), getattr(made, name)
        assert ((mask != 0).sum(-1) == count).all()
        order = logits.detach().clamp(max=hard_concrete.LARGEST).argsort(dim=-1, descending=True, stable=True)
        assert (mask.gather(-1, order[..., :count]) > 0.99).all()


def test_what_is_taken_out_of_the_weights_is_read_again_within_the_limits(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = models.build("llama")
    made = module.install(model, SHAPE, ramp=10)
    with torch.no_grad():
        made.hidden_D[:2] = torch.tensor([9.0, -9.0])
    weights = {name: value.detach() for name, value in model.named_parameters()}
    logits = module.take_out(weights)
    assert not any(name.startswith("masks") for name in weights)
    module.write(tmp_path, logits)
    read = module.read(tmp_path)
    assert read.keys() == {"group_LK", "neuron_LN", "hidden_D"}
    assert read["hidden_D"][:2].tolist() == pytest.approx([hard_concrete.LARGEST, hard_concrete.SMALLEST])
