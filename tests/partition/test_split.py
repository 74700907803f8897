"""Index files, assignments, routers and the split itself."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
import torch
from dense_models import dense_model, sample, splitting
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tasks import settings
from tasks.moe import checkpoint
from tasks.moe.loss import window_nll
from tasks.partition import activation, assignment, build, calibration, index, random_split, router, split


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 5))
@hypothesis_settings(max_examples=20, deadline=None)
def test_a_random_split_is_a_partition_that_its_seed_fixes(experts, size, seed):
    made = random_split.split_layer(experts * size, experts=experts, seed=seed, layer=1)
    assert made.shape == (experts, size)
    assert sorted(made.reshape(-1)) == list(range(experts * size))
    np.testing.assert_array_equal(made, random_split.split_layer(experts * size, experts=experts, seed=seed, layer=1))


def test_layers_and_seeds_get_other_random_splits():
    places = [(seed, layer) for seed in range(3) for layer in range(3)]
    made = {random_split.split_layer(64, experts=4, seed=seed, layer=layer).tobytes() for seed, layer in places}
    assert len(made) == 9


def test_an_index_file_gives_back_the_index_and_the_same_bytes(tmp_path):
    layers = tuple(np.random.default_rng(i).permutation(24).astype(np.int32).reshape(6, 4) for i in range(12))
    made = index.Index(layers=layers, shared_experts=2, meta={"b": 1, "a": [["prose", 3]]})
    index.write(made, tmp_path / "one")
    index.write(made, tmp_path / "two")
    found = index.read(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert all(np.array_equal(a, b) for a, b in zip(found.layers, layers, strict=True))
    assert (found.experts, found.shared_experts, found.expert_size, found.meta) == (4, 2, 4, made.meta)
    assert found.problems(24) == []


def test_an_index_names_layers_that_lose_or_repeat_a_neuron():
    good = np.arange(12, dtype=np.int32).reshape(3, 4)
    bad = good.copy()
    bad[0, 0] = 11
    (problem,) = index.Index(layers=(good, bad), shared_experts=0, meta={}).problems(12)
    assert "layer 1" in problem
    assert "[0, 11]" in problem
    assert index.Index(layers=(good,), shared_experts=0, meta={}).problems(13)


def test_a_file_that_is_no_index_is_refused_by_name(tmp_path, tiny_model):
    (tmp_path / "cut.safetensors").write_bytes(b"\x80" * 20)
    for path in (tmp_path / "cut.safetensors", tmp_path / "absent", tiny_model / "model.safetensors"):
        with pytest.raises(ValueError, match="partition"):
            index.read(path)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
@hypothesis_settings(max_examples=30, deadline=None)
def test_both_assignments_fill_every_group_and_the_exact_one_costs_no_more(groups, size, seed):
    random = np.random.default_rng(seed)
    sizes = np.array([size] * groups + [2 * size])
    cost = random.standard_normal((sizes.sum(), groups + 1))
    exact, greedy = assignment.balanced(cost, sizes_G=sizes), assignment._greedy(cost, sizes)
    rows = np.arange(len(cost))
    for made in (exact, greedy):
        np.testing.assert_array_equal(np.bincount(made, minlength=len(sizes)), sizes)
    assert cost[rows, exact].sum() <= cost[rows, greedy].sum() + 1e-9
    shuffled = cost[rows, np.repeat(np.arange(groups + 1), sizes)].sum()
    assert cost[rows, exact].sum() <= shuffled + 1e-9


def test_groups_that_do_not_hold_all_neurons_are_refused():
    with pytest.raises(ValueError, match="groups hold 4 neurons, but there are 5"):
        assignment.balanced(np.zeros((5, 2)), sizes_G=np.array([2, 2]))


def test_the_router_finds_experts_whose_energy_is_a_function_of_the_input():
    torch.manual_seed(0)
    x, truth = torch.randn(4000, 16), torch.randn(6, 16)
    energy = (x @ truth.T).exp()
    weight = router.fit(x, energy)
    index_TK, weights_TK = router.chosen(weight, x, top_k=2)
    best = energy.topk(2, 1).indices
    agreement = (index_TK[:, :, None] == best[:, None]).any(2).float().mean()
    assert agreement > 0.97
    torch.testing.assert_close(weights_TK.sum(1), torch.ones(4000))


def test_scaling_sets_the_spread_of_the_logits_and_changes_no_choice():
    torch.manual_seed(0)
    x, weight = torch.randn(500, 16), torch.randn(6, 16) + 3
    scaled = router.scaled(weight, x, std=0.1)
    assert (x @ scaled.T).std().item() == pytest.approx(0.1, rel=1e-4)
    assert torch.equal(router.chosen(scaled, x, top_k=3)[0], router.chosen(weight, x, top_k=3)[0])


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
    made, weight = activation.split_layer(
        x, h[:, shuffle], torch.eye(16), experts=3, shared_experts=1, top_k=1, seed=0
    )
    original = shuffle.numpy()[made]
    assert set(original[0]) == {0, 1, 2, 3}
    groups = {frozenset(row.tolist()) for row in original[1:]}
    assert groups == {frozenset(range(4 + 4 * g, 8 + 4 * g)) for g in range(3)}
    chosen = router.chosen(weight, x, top_k=1)[0][:, 0]
    of_expert = torch.from_numpy(original[1:, 0] // 4 - 1)
    assert (of_expert[chosen] == kind).float().mean() > 0.99


def test_hidden_states_moved_up_layer_by_layer_are_those_of_the_model():
    dense = dense_model(layers=3)
    ids = sample((5, 30))
    with torch.no_grad():
        expected = dense(input_ids=torch.from_numpy(ids), output_hidden_states=True).hidden_states
        states = calibration.States(dense, ids)
        for layer in range(2):
            x_TD = states.attend(layer)
            mlp = dense.model.layers[layer].mlp
            states.add(calibration.neurons(mlp, x_TD) @ mlp.down_proj.weight.T)
            torch.testing.assert_close(states._hidden_BLD, expected[layer + 1], rtol=1e-4, atol=1e-4)


def test_a_converted_layer_computes_in_calibration_what_the_checkpoint_computes():
    """The split measures its error on masks over neurons; here that is held against the real model."""
    dense = dense_model(layers=1)
    partition = settings.Partition(method="activation", experts=6, shared_experts=2, top_k=2, router_std=0.5)
    split_index, found = splitting(dense, partition)
    moe = build.convert(dense, split_index, found.routers, partition=partition)
    moe.set_experts_implementation("eager")
    inputs, outputs = [], {}
    dense.model.layers[0].mlp.register_forward_hook(
        lambda _m, i, o: inputs.append(i[0]) or outputs.update(dense=o)  # both give None, which keeps the output
    )
    with torch.no_grad():
        dense(input_ids=torch.from_numpy(sample()))
        layer = moe.model.layers[0]
        sparse = layer.block_sparse_moe(inputs[0]) + layer.shared_mlp(inputs[0])
    error = ((outputs["dense"] - sparse).square().sum() / outputs["dense"].square().sum()).item()
    assert error == pytest.approx(found.errors[0], rel=1e-3)


def test_the_fitted_split_of_a_trained_model_loses_less_than_the_random_one(tiny_model, tiny_data):
    with gzip.open(tiny_data / "prose.jsonl.gz", "rt") as file:
        text = "".join(json.loads(line)["text"] for line in file)
    dense = checkpoint.load(tiny_model)
    ids = np.array(AutoTokenizer.from_pretrained(tiny_model)(text)["input_ids"][: 60 * 64]).reshape(60, 64)
    losses = {"dense": window_nll(dense, ids[40:], batch=10).mean()}
    for method in ("random", "activation"):
        partition = settings.Partition(method=method, experts=16, top_k=4)
        if method == "random":
            found = split.at_random(dense, partition)
        else:
            found = split.by_activation(dense, ids[:40], partition=partition, report=lambda _text: None)
        made = index.Index(layers=found.layers, shared_experts=0, meta={})
        moe = build.convert(dense, made, found.routers, partition=partition)
        losses[method] = window_nll(moe, ids[40:], batch=10).mean()
    assert losses["dense"] < losses["activation"] < losses["random"]


def test_unequal_weights_add_little_to_the_error_however_large_router_std_is():
    dense = dense_model(layers=1)
    errors = {}
    for std in (1e-6, 0.1, 10.0):
        partition = settings.Partition(method="activation", experts=6, shared_experts=2, top_k=2, router_std=std)
        errors[std] = splitting(dense, partition)[1].errors[0]
    assert errors[10.0] < 1.2 * errors[1e-6]
    assert errors[0.1] < 1.2 * errors[1e-6]


def test_the_same_seed_gives_the_same_split_and_another_seed_another(partition):
    dense = dense_model()
    one, two = splitting(dense, partition)[1], splitting(dense, partition)[1]
    assert all(np.array_equal(a, b) for a, b in zip(one.layers, two.layers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.routers, two.routers, strict=True))
    other = settings.Partition(**(partition.model_dump() | {"method": "random", "shared_experts": 0, "seed": 1}))
    base = settings.Partition(**(other.model_dump() | {"seed": 0}))
    assert not np.array_equal(splitting(dense, other)[1].layers[0], splitting(dense, base)[1].layers[0])


@pytest.mark.parametrize("scale", ["unit", "paper", "mean", "variance"])
def test_the_scale_is_what_the_routed_weights_sum_to(scale):
    partition = settings.Partition(method="random", experts=8, top_k=2, scale=scale)
    expected = {"unit": 2, "paper": 4, "mean": 8, "variance": 4}[scale]
    assert build.scale(partition) == pytest.approx(expected)
    dense = dense_model(layers=1)
    made, found = splitting(dense, partition)
    moe = build.convert(dense, made, found.routers, partition=partition)
    weight = dense.model.layers[0].mlp.down_proj.weight[:, made.layers[0][3]]
    torch.testing.assert_close(moe.model.layers[0].mlp.experts.down_proj[3], weight * expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"attention_bias": True}, "attention_bias = true, which Mixtral has not"),
        ({"intermediate_size": 50}, "does not divide the FFN width 50; totals that do: 2, 5, 10, 25"),
    ],
)
def test_what_a_sparse_class_cannot_express_is_refused(change, message):
    config = dense_model().config
    for field, value in change.items():
        setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        build.moe_config(config, settings.Partition(method="random", experts=6, top_k=2))


def test_a_source_tensor_without_a_place_stops_the_conversion(partition):
    dense = dense_model()
    made, found = splitting(dense, partition)
    dense.model.layers[0].register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"no place for \['model\.layers\.0\.extra'\]"):
        build.convert(dense, made, found.routers, partition=partition)


def test_an_index_that_is_no_partition_stops_the_conversion(partition):
    dense = dense_model()
    made, found = splitting(dense, partition)
    layers = (made.layers[0] * 0, *made.layers[1:])
    with pytest.raises(ValueError, match="layer 0 is no partition"):
        build.convert(dense, dataclasses.replace(made, layers=layers), found.routers, partition=partition)
