"""The peers' splits and routers against their descriptions, by brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.partition import peers
from tasks.partition.layer import Layer


def layer_of(width=48, hidden=16, tokens=300, seed=0, number=0):
    draw = torch.Generator().manual_seed(seed)
    gate, up, x = (torch.randn(rows, hidden, generator=draw) for rows in (width, width, tokens))
    return Layer(number=number, gate_ND=gate, up_ND=up, down_DN=torch.randn(hidden, width, generator=draw), x_TD=x)


@pytest.mark.parametrize("split", ["random", "clustering"])
def test_llama_moe_deals_every_neuron_once(split):
    index = peers.llama_moe_split(layer_of(), split, experts=8, generator=np.random.default_rng(0))
    assert index.shape == (8, 6)
    assert sorted(index.reshape(-1)) == list(range(48))


def test_llama_moe_clusters_the_directions_of_the_up_rows_whatever_their_length():
    draw = torch.Generator().manual_seed(1)
    kind = torch.arange(48) % 4
    up = (F.one_hot(kind, 16) + 0.05 * torch.randn(48, 16, generator=draw)) * torch.logspace(-1, 1, 48)[:, None]
    layer = Layer(number=0, gate_ND=up, up_ND=up, down_DN=up.T)
    index = peers.llama_moe_split(layer, "clustering", experts=4, generator=np.random.default_rng(0))
    assert {frozenset(kind[expert].tolist()) for expert in index} == {frozenset({k}) for k in range(4)}


@pytest.mark.parametrize("gate", ["tanh", "linear"])
def test_llama_moe_with_every_expert_on_gives_nearly_the_dense_output_over_their_number(gate):
    """The gate starts so small that its weights are nearly equal, and the scale E / K is then 1."""
    layer = layer_of()
    got = peers.llama_moe("random", experts=8, top_k=8, gate=gate)(layer)(layer.inputs)
    dense = layer.dense(layer.inputs) / 8
    assert (got - dense).norm() < 0.2 * dense.norm()


def test_llama_moe_gives_a_chosen_expert_the_weight_of_the_scale():
    layer = layer_of()
    got = peers.llama_moe("random", experts=8, top_k=1)(layer)(layer.inputs)
    draw = np.random.default_rng([0, 0])
    index = peers.llama_moe_split(layer, "random", experts=8, generator=draw)
    h = layer.neurons(layer.inputs)
    each = torch.stack([h[:, expert] @ layer.down_DN[:, expert].T for expert in index]) * 8
    nearest = (each - got).norm(dim=-1).min(0).values
    assert nearest.max() < 1e-4 * got.norm(dim=-1).max()


def test_the_same_seed_gives_the_same_layer_and_another_seed_or_layer_another_one():
    def output(seed, number):
        layer = layer_of(number=number)
        return peers.llama_moe("random", experts=8, top_k=2, seed=seed)(layer)(layer.inputs)

    assert torch.equal(output(0, 0), output(0, 0))
    assert not torch.equal(output(0, 0), output(1, 0))
    assert not torch.equal(output(0, 0), output(0, 1))


def brute_markers(layer):
    """Which tenth of the neurons is active on each token, from the words of the description."""
    x, gate, up = (t.double().numpy() for t in (layer.inputs, layer.gate_ND, layer.up_ND))
    x, gate, up = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, gate, up))
    g = x @ gate.T
    size = np.abs(g / (1 + np.exp(-g)) * (x @ up.T))
    count = round(size.shape[1] * 0.1)
    return np.array([[n in set(np.argsort(-token)[:count]) for n in range(len(token))] for token in size], dtype=float)


def test_cmoe_shares_the_neurons_that_are_active_most_often_and_deals_the_others_once():
    layer = layer_of()
    index, representative = peers.cmoe_split(layer, experts=6, shared=2)
    rate = brute_markers(layer).mean(0)
    assert sorted(index.reshape(-1)) == list(range(48))
    shared, routed = index[:2].reshape(-1), index[2:].reshape(-1)
    assert rate[shared].min() >= rate[routed].max()
    assert all(neuron in expert for neuron, expert in zip(representative, index[2:], strict=True))


def test_cmoe_assigns_at_the_least_total_distance_and_represents_an_expert_by_its_middle():
    layer = layer_of(width=40, tokens=120)
    index, representative = peers.cmoe_split(layer, experts=2, shared=2)
    markers = brute_markers(layer)
    rest = np.sort(index[2:].reshape(-1))
    centres = markers[:, sorted(rest, key=lambda n: (-markers[:, n].mean(), n))[:2]]
    cost = np.abs(markers[:, rest, None] - centres[:, None]).sum(0)
    gain = np.sort(cost[:, 0] - cost[:, 1])
    least = cost[:, 1].sum() + gain[:10].sum()  # of two experts of 10, the first takes whom it suits best
    got = sum(np.abs(markers[:, n] - centres[:, e]).sum() for e in (0, 1) for n in index[2 + e])
    assert got == pytest.approx(least)
    for neuron, expert in zip(representative, index[2:], strict=True):
        middle = markers[:, expert].mean(1)
        far = [np.abs(markers[:, n] - middle).sum() for n in expert]
        assert np.abs(markers[:, neuron] - middle).sum() == pytest.approx(min(far))


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_cmoe_adds_the_experts_whose_representatives_answer_loudest_with_weight_one(top_k):
    layer = layer_of()
    index, representative = peers.cmoe_split(layer, experts=6, shared=2)
    got = peers.cmoe(experts=6, shared=2, top_k=top_k)(layer)(layer.inputs)
    h = layer.neurons(layer.inputs)
    gate, up = (F.normalize(rows[representative], dim=1) for rows in (layer.gate_ND, layer.up_ND))
    score = (F.silu(layer.inputs @ gate.T) * (layer.inputs @ up.T)).abs()
    for t in range(len(h)):
        chosen = [0, 1, *(2 + e for e in score[t].argsort(descending=True)[:top_k].tolist())]
        neurons = np.concatenate([index[e] for e in chosen])
        expected = layer.down_DN[:, neurons] @ h[t, neurons]
        torch.testing.assert_close(got[t], expected, rtol=1e-3, atol=1e-3)
