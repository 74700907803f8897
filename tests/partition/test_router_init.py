"""Routers as they start: random, from gate rows, and fitted."""

import numpy as np
import pytest
import torch
from dense_models import ffn

from tasks.partition import router_init

EXPERTS = np.arange(48).reshape(6, 8)


def test_a_random_router_has_the_papers_spread_and_its_seed_and_layer_fix_it():
    made = router_init.random_weights(64, 512, seed=1, layer=2)
    assert made.std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(made, router_init.random_weights(64, 512, seed=1, layer=2))
    assert not torch.equal(made, router_init.random_weights(64, 512, seed=1, layer=3))
    assert not torch.equal(made, router_init.random_weights(64, 512, seed=2, layer=2))


def test_a_centroid_is_the_mean_gate_row_of_the_experts_neurons():
    layer = ffn()
    made = router_init.start("centroid", layer, EXPERTS, seed=0)
    torch.testing.assert_close(made[2], layer.gate_ND[16:24].mean(0))


def test_a_representative_is_the_neuron_that_moves_with_its_expert():
    """Expert 1 is its neuron 11: the others of it contribute next to nothing."""
    layer = ffn()
    layer.down_DN[:, 8:16] *= 0.01
    layer.down_DN[:, 11] *= 100
    made = router_init.start("analytical", layer, EXPERTS, seed=0)
    assert torch.equal(made[1], layer.gate_ND[11])
    assert all(any(torch.equal(row, gate) for gate in layer.gate_ND[8 * e : 8 * e + 8]) for e, row in enumerate(made))


def test_an_experts_energy_is_the_sum_over_its_neurons_of_what_they_put_out():
    layer = ffn(tokens=5)
    ((_, h_TN),) = layer.chunks()
    expected = torch.stack(
        [sum((h_TN[:, n, None] * layer.down_DN[:, n]).square().sum(1) for n in row) for row in EXPERTS], dim=1
    )
    torch.testing.assert_close(router_init.energies(h_TN, layer.down_DN, EXPERTS), expected)


def test_the_fitted_router_finds_the_expert_that_a_direction_of_the_input_switches_on():
    """Gate rows of expert e are the e-th unit vector, and inputs have one large entry."""
    layer = ffn(tokens=3000)
    kind = torch.arange(3000) % 6
    layer.gate_ND = torch.eye(6, 16).repeat_interleave(8, 0)
    layer.x_TD = 0.1 * torch.randn(3000, 16) + 4 * torch.eye(6, 16)[kind]
    made = router_init.regression(layer, EXPERTS, tokens=torch.arange(2000))
    chosen, weights = router_init.chosen(made, layer.x_TD[2000:], top_k=2)
    assert (chosen[:, 0] == kind[2000:]).float().mean() > 0.99
    torch.testing.assert_close(weights.sum(1), torch.ones(1000))


def test_the_fit_does_not_depend_on_how_the_tokens_are_cut(monkeypatch):
    whole = router_init.regression(ffn(tokens=100), EXPERTS)
    monkeypatch.setattr("tasks.partition.layer.CHUNK", 17)
    monkeypatch.setattr("tasks.partition.layer.CACHE_BYTES", 0)
    torch.testing.assert_close(router_init.regression(ffn(tokens=100), EXPERTS), whole, rtol=1e-4, atol=1e-5)


def test_a_method_that_needs_text_says_so_without_any():
    layer = ffn()
    layer.x_TD = None
    with pytest.raises(ValueError, match="layer 0: no calibration tokens"):
        router_init.regression(layer, EXPERTS)
