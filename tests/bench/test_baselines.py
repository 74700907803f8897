"""Bounds and pruning against transformers' own model with its FFNs masked by hand, and against brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from bench.partition import baselines
from tasks.moe.loss import window_nll
from tasks.moe.streamed import Streamed
from tasks.partition import converted
from tasks.partition.layer import Layer

WIDTH = 128


def windows(seed, shape=(6, 40)):
    return np.random.default_rng(seed).integers(0, 512, shape)


@pytest.fixture(scope="module")
def validation():
    return {"one": windows(0, (3, 40)), "two": windows(1, (2, 40))}


@pytest.fixture(scope="module")
def whole(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def nats(model, validation):
    return {
        name: float(window_nll(model, ids, batch=2).mean() / (ids.shape[1] - 1)) for name, ids in validation.items()
    }


def down_inputs(model, *, layer, ids):
    """h of one layer on these windows, [T, N], and |residual|^2 + |output of the whole FFN|^2, [T]."""
    got, block = [], model.model.layers[layer]
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args: got.append(args[0])),
        block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: got.append(args[0])),
    ]
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids))
    for hook in hooks:
        hook.remove()
    residual, h = (part.flatten(0, 1) for part in got)
    output = h @ block.mlp.down_proj.weight.T
    return h, residual.square().sum(1) + output.square().sum(1)


def layer_of(width=24, hidden=8, tokens=200, seed=0):
    draw = torch.Generator().manual_seed(seed)
    gate, up, x = (torch.randn(rows, hidden, generator=draw) for rows in (width, width, tokens))
    return Layer(number=0, gate_ND=gate, up_ND=up, down_DN=torch.randn(hidden, width, generator=draw), x_TD=x)


def test_the_dense_ffns_give_the_loss_of_the_whole_model(tiny_model, whole, validation):
    got = baselines.measure(Streamed(tiny_model), validation, baselines.dense, calibration=windows(2), batch=2)
    assert got.nats == pytest.approx(nats(whole, validation), rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_neuron_oracle_is_the_model_with_all_but_the_largest_neurons_of_each_token_masked(
    tiny_model, whole, validation, weighted
):
    got = baselines.measure(Streamed(tiny_model), validation, baselines.neuron_oracle(0.25, weighted=weighted))
    hooks = []
    for block in whole.model.layers:
        norm = block.mlp.down_proj.weight.norm(dim=0) if weighted else torch.ones(WIDTH)

        def mask(_module, args, norm=norm):
            size = args[0].abs() * norm
            return args[0] * (size >= size.sort(dim=-1, descending=True).values[..., WIDTH // 4 - 1, None])

        hooks.append(block.mlp.down_proj.register_forward_pre_hook(mask))
    expected = nats(whole, validation)
    for hook in hooks:
        hook.remove()
    assert got.nats == pytest.approx(expected, rel=1e-5)
    assert got.nats != pytest.approx(nats(whole, validation), rel=1e-3)


def test_static_pruning_picks_each_layers_neurons_on_what_the_pruned_layers_below_give(tiny_model, whole, validation):
    seen = windows(3)
    got = baselines.measure(Streamed(tiny_model), validation, baselines.static(0.5), calibration=seen)
    hooks = []
    for i, block in enumerate(whole.model.layers):
        h, size = down_inputs(whole, layer=i, ids=seen)  # a token's error counts in proportion to its hidden state
        energy = (h.double().square() / size[:, None].double()).mean(0)
        energy = energy * block.mlp.down_proj.weight.double().square().sum(0)
        kept = torch.zeros(WIDTH).index_fill(0, energy.argsort(descending=True)[: WIDTH // 2], 1.0)
        hooks.append(block.mlp.down_proj.register_forward_pre_hook(lambda _, args, kept=kept: (args[0] * kept,)))
    expected = nats(whole, validation)
    for hook in hooks:
        hook.remove()
    assert got.nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_refit_is_a_splits_around_the_weights_as_they_are_with_drift_and_token_weights(share):
    layer, draw = layer_of(), torch.Generator().manual_seed(1)
    layer.weight_T = torch.rand(200, generator=draw)
    layer.drift_TD = 0.1 * torch.randn(200, 8, generator=draw)
    h, drift = layer.neurons(layer.inputs).double().numpy(), layer.drift_TD.double().numpy()
    down, weight = layer.down_DN.double().numpy(), layer.weight_T.double().numpy()
    kept = np.sort(np.argsort(-((weight[:, None] * h**2).sum(0) * (down**2).sum(0)))[: round(24 * share)])
    y, rows, root = h @ down.T, h[:, kept], np.sqrt(weight)[:, None]
    mean = (weight[:, None] * rows**2).sum() / 24  # over all neurons, of which the dropped ones give nothing
    ridge = np.sqrt(converted.RIDGE * mean) * np.eye(len(kept))
    around = np.concatenate([root * (y + drift), ridge @ down[:, kept].T])
    best, *_ = np.linalg.lstsq(np.concatenate([root * rows, ridge]), around, rcond=None)
    got = baselines.static(share, refit=True)(layer)(layer.inputs)
    np.testing.assert_allclose(got.numpy(), rows @ best, rtol=1e-4, atol=2e-4)
    errors = [
        float((layer.weight_T * (given - torch.from_numpy(y + drift).float()).square().sum(1)).sum())
        for build in (
            baselines.static(share),
            baselines.static(share, refit=True),
            baselines.static(share, refit=True, fit_passes=20),
        )
        for given in [build(layer)(layer.inputs)]
    ]
    assert errors[0] > errors[1] > errors[2]


def test_static_rows_are_given_the_drift_of_the_layers_below_and_the_weights_of_tokens(tiny_model, validation):
    seen = []

    def build(layer):
        seen.append((layer.drift_TD.norm().item(), layer.weight_T.mean().item()))
        return lambda x_TD: 0.5 * layer.dense(x_TD)

    baselines.measure(Streamed(tiny_model), validation, build, calibration=windows(2), batch=2)
    assert seen[0][0] == 0
    assert all(drift > 0 for drift, _ in seen[1:])
    assert [mean for _, mean in seen] == pytest.approx([1] * len(seen), rel=1e-4)


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_the_expert_oracle_keeps_for_every_token_the_experts_with_most_energy(top_k):
    layer = layer_of()
    index = np.random.default_rng(0).permutation(24).reshape(8, 3).astype(np.int32)
    got = baselines.expert_oracle({0: index}, shared=2, top_k=top_k)(layer)(layer.inputs)
    x, gate, up, down = (t.double().numpy() for t in (layer.inputs, layer.gate_ND, layer.up_ND, layer.down_DN))
    g = x @ gate.T
    h = g / (1 + np.exp(-g)) * (x @ up.T)
    for t, token in enumerate(h):
        outputs = [down[:, expert] @ token[expert] for expert in index]
        energy = [((token[e] * np.linalg.norm(down[:, e], axis=0)) ** 2).sum() for e in index[2:]]
        chosen = [2 + e for e in np.argsort(energy)[::-1][:top_k]]
        np.testing.assert_allclose(got[t].numpy(), sum(outputs[e] for e in [0, 1, *chosen]), rtol=1e-3, atol=1e-4)


def test_a_neuron_in_two_chosen_experts_counts_twice_and_one_in_none_not_at_all():
    layer = layer_of(width=4)
    index = np.array([[0, 1], [1, 2]], dtype=np.int32)
    got = baselines.expert_oracle({0: index}, shared=0, top_k=2)(layer)(layer.inputs)
    h = F.silu(layer.inputs @ layer.gate_ND.T) * (layer.inputs @ layer.up_ND.T)
    torch.testing.assert_close(got, (h * torch.tensor([1.0, 2.0, 1.0, 0.0])) @ layer.down_DN.T)


def test_a_layer_without_an_entry_in_the_partition_stays_dense():
    layer = layer_of()
    got = baselines.expert_oracle({1: np.zeros((2, 3), dtype=np.int32)}, shared=0, top_k=1)(layer)(layer.inputs)
    torch.testing.assert_close(got, layer.dense(layer.inputs))
