"""The activation method and its assignment."""

import numpy as np
import pytest
import torch
from dense_models import ffn
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tasks import settings
from tasks.partition import methods, router_init
from tasks.partition.layer import Layer, Sizes


class _Planted(Layer):
    """An FFN whose neurons' activations are given instead of computed."""

    def chunks(self, tokens=None):
        yield (self.x_TD, self.planted) if tokens is None else (self.x_TD[tokens], self.planted[tokens])


def test_always_active_neurons_become_shared_and_co_active_ones_an_expert():
    """Neurons 0 to 3 fire on every token; 4 to 7, 8 to 11 and 12 to 15 each on one kind of token."""
    torch.manual_seed(0)
    kind = torch.arange(600) % 3
    x = torch.nn.functional.one_hot(kind, 3).float() @ torch.randn(3, 8) + 0.05 * torch.randn(600, 8)
    h = 0.01 * torch.rand(600, 16)
    h[:, :4] = 3 + torch.rand(600, 4)
    for group in range(3):
        h[kind == group, 4 + 4 * group : 8 + 4 * group] = 1 + torch.rand(200, 4)
    shuffle = torch.randperm(16)
    layer = _Planted(number=0, gate_ND=torch.zeros(16, 8), up_ND=torch.zeros(16, 8), down_DN=torch.eye(16), x_TD=x)
    layer.planted = h[:, shuffle]
    sizes = Sizes(width=16, experts=3, shared=1, size=4, top_k=1)
    options = settings.Partition(method="activation", experts=3, shared_experts=1, top_k=1)
    made = methods.get("activation").split(layer, sizes, options)
    original = shuffle.numpy()[made]
    assert set(original[0]) == {0, 1, 2, 3}
    groups = {frozenset(row.tolist()) for row in original[1:]}
    assert groups == {frozenset(range(4 + 4 * g, 8 + 4 * g)) for g in range(3)}
    chosen = router_init.chosen(router_init.regression(layer, made[1:]), x, top_k=1)[0][:, 0]
    of_expert = torch.from_numpy(original[1:, 0] // 4 - 1)
    assert (of_expert[chosen] == kind).float().mean() > 0.99


@given(
    experts=st.integers(1, 6),
    shared=st.integers(0, 3),
    size=st.integers(1, 4),
    top_k=st.integers(1, 6),
    seed=st.integers(0, 3),
)
@hypothesis_settings(max_examples=25, deadline=None)
def test_every_neuron_stands_once_whatever_the_sizes(experts, shared, size, top_k, seed):
    width, top_k = size * (experts + shared), min(top_k, experts)
    options = settings.Partition(method="activation", experts=experts, shared_experts=shared, top_k=top_k, seed=seed)
    sizes = Sizes(width=width, experts=experts, shared=shared, size=size, top_k=top_k)
    made = methods.get("activation").split(ffn(tokens=60, width=width), sizes, options)
    assert made.shape == (experts + shared, size)
    assert sorted(made.reshape(-1)) == list(range(width))
    np.testing.assert_array_equal(made, methods.get("activation").split(ffn(tokens=60, width=width), sizes, options))


@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_chunks_give_the_tokens_asked_for_in_their_order(cache, monkeypatch):
    monkeypatch.setattr("tasks.partition.layer.CACHE_BYTES", cache)
    monkeypatch.setattr("tasks.partition.layer.CHUNK", 7)
    layer = ffn(tokens=40)
    gate, up = layer.x_TD @ layer.gate_ND.T, layer.x_TD @ layer.up_ND.T
    expected = torch.nn.functional.silu(gate) * up
    some = torch.tensor([3, 1, 38, 20, 5, 6, 7, 8, 9])
    for tokens in (None, some):
        parts = list(layer.chunks(tokens))
        wanted = torch.arange(40) if tokens is None else tokens
        torch.testing.assert_close(torch.cat([x for x, _ in parts]), layer.x_TD[wanted])
        torch.testing.assert_close(torch.cat([h for _, h in parts]), expected[wanted])
