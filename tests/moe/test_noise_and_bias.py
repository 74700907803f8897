"""Noisy top-k and the selection bias on stock routers: what they change, what they leave, what stays at the end."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sparse_models import CONFIGS, EXPERTS, HIDDEN, TOP_K, UNNORMALISED, build, lively

from tasks.moe import files, gate, linear, routing

ALL = CONFIGS | UNNORMALISED
IDS = torch.arange(24).view(2, 12)
BIAS = [[0.3, -0.2, 0.1, 0.0, -0.1, -0.1], [-0.4, 0.4, 0.2, -0.2, 0.0, 0.0]]


def first(model):
    return routing.routers(model)[0]


def weighed(logits_TE, chosen_TK, *, normalised):
    """The weights of these experts by definition, fp64."""
    shares = logits_TE.double().softmax(1).gather(1, chosen_TK)
    return shares / shares.sum(1, keepdim=True) if normalised else shares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ALL)
def test_in_evaluation_a_noisy_router_is_the_stock_router_bit_for_bit(kind, dtype):
    stock, noisy = build(kind, dtype), build(kind, dtype)
    gate.add_noise(noisy)
    x_TD = torch.randn(40, HIDDEN, dtype=dtype)
    for expected, noised in zip(first(stock)(x_TD), first(noisy)(x_TD), strict=True):
        assert torch.equal(expected, noised)
        assert expected.dtype == noised.dtype
    assert isinstance(first(noisy), type(first(stock)))
    with torch.no_grad():
        assert torch.equal(stock(input_ids=IDS).logits, noisy(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ALL)
def test_in_training_it_weighs_by_the_noisy_logits_as_its_class_does_and_the_deviation_follows_the_noise_weights(kind):
    model = build(kind).train()
    gate.add_noise(model)
    router = first(model)
    with torch.no_grad():
        router.noise.weight.normal_(std=0.5)
    x_TD = torch.randn(4, HIDDEN).repeat(5000, 1)
    logits, weights, chosen = router(x_TD)
    clean = x_TD[:4] @ router.weight.T
    drawn = (logits.view(5000, 4, EXPERTS) - clean).detach()
    std = torch.nn.functional.softplus(x_TD[:4] @ router.noise.weight.T) + 0.01
    assert ((drawn.std(0) / std - 1).abs() < 0.05).all()  # five deviations of the estimate
    assert (drawn.mean(0).abs() < 5 * std / math.sqrt(5000)).all()
    assert torch.equal(chosen.sort(1)[0], logits.topk(TOP_K, dim=1).indices.sort(1)[0])
    expected = weighed(logits, chosen, normalised=kind != "unnormalised")
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=1e-5)


def test_noise_starts_at_zero_weights_comes_from_the_global_generator_and_is_trained():
    model = build().train()
    stock = {name for name, _ in model.named_parameters()}
    gate.add_noise(model)
    gate.add_noise(model)  # again changes nothing
    added = {name for name, _ in model.named_parameters()} - stock
    assert added == {f"model.layers.{layer}.mlp.gate.noise.weight" for layer in range(2)}
    assert not any(router.noise.weight.any() for router in routing.routers(model))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(input_ids=IDS, labels=IDS).loss)
    assert losses[0] == losses[1] != losses[2]
    losses[2].backward()
    assert all(router.noise.weight.grad.abs().sum() > 0 for router in routing.routers(model))


def test_noise_is_added_to_two_layer_gates_too_and_leaves_the_noise_weights_that_are_there():
    model = build()
    gate.swap_in(model, {0: lively(noise=False)})
    gate.swap_in(model, {1: gate.Gate(**{**vars(lively(1)), "noise_ED": torch.ones(EXPERTS, HIDDEN)})})
    gate.add_noise(model)
    assert not first(model).noise.weight.any()
    assert (routing.routers(model)[1].noise.weight == 1).all()


@given(
    bias=st.lists(st.floats(-3, 3, width=32), min_size=EXPERTS, max_size=EXPERTS), kind=st.sampled_from(sorted(ALL)),
    tanh=st.booleans(), training=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_a_bias_changes_the_choice_and_never_the_weights_of_what_is_chosen(bias, kind, tanh, training, seed):
    model = build(kind).train(training)
    if tanh and kind != "unnormalised":
        gate.swap_in(model, {0: lively(noise=False)})
    plain = copy.deepcopy(first(model))
    gate.add_bias(model)
    gate.set_biases(model, [bias, bias])
    router = first(model)
    x_TD = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(seed))
    logits, weights, chosen = router(x_TD)
    assert torch.equal(logits, plain(x_TD)[0])
    by = logits.float() + torch.tensor(bias)
    assert torch.equal(chosen.sort(1)[0], by.topk(TOP_K, dim=1).indices.sort(1)[0])
    expected = weighed(logits, chosen, normalised=kind != "unnormalised")
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=1e-5)
    assert [part.dtype for part in (logits, weights, chosen)] == [part.dtype for part in plain(x_TD)]


@pytest.mark.parametrize("kind", ALL)
def test_the_gradient_through_a_biased_choice_is_that_of_the_weights_by_definition(kind):
    model = build(kind)
    gate.add_bias(model)
    gate.set_biases(model, BIAS)
    router = first(model)
    x_TD, upstream_TK = torch.randn(30, HIDDEN), torch.randn(30, TOP_K)
    logits, weights, chosen = router(x_TD)
    (weights * upstream_TK).sum().backward()
    assert (chosen != logits.topk(TOP_K, dim=1).indices).any()
    weight = router.weight.detach().double().requires_grad_()
    expected = weighed(x_TD.double() @ weight.T, chosen, normalised=kind != "unnormalised")
    (expected * upstream_TK).sum().backward()
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_a_half_precision_model_keeps_fp32_biases_exactly_and_its_own_dtypes_otherwise(kind):
    stock, model = build(kind, torch.bfloat16), build(kind)
    gate.add_bias(model)
    gate.set_biases(model, BIAS)
    model.to(torch.bfloat16)
    assert json.loads(json.dumps(gate.biases(model))) == torch.tensor(BIAS).tolist()
    assert first(model).selection_bias.dtype == torch.float32
    x_TD = torch.randn(9, HIDDEN, dtype=torch.bfloat16)
    output, expected = first(model)(x_TD), first(stock)(x_TD)
    assert [part.dtype for part in output] == [part.dtype for part in expected]
    assert torch.equal(output[0], expected[0])
    gate.set_biases(model, [[0.0] * EXPERTS] * 2)
    for part, same in zip(first(model)(x_TD), expected, strict=True):
        torch.testing.assert_close(part, same, atol=1e-2, rtol=1e-2)


def test_a_bias_is_no_parameter_and_no_part_of_a_checkpoint_and_chooses_in_the_whole_model():
    model = build()
    names, stored = {name for name, _ in model.named_parameters()}, model.state_dict().keys()
    gate.add_bias(model)
    assert {name for name, _ in model.named_parameters()} == names
    assert model.state_dict().keys() == stored
    gate.set_biases(model, [[0, 50, 0, 0, 50, 0], [50, 0, 0, 0, 0, 50]])
    for mode in (True, False):
        with routing.expert_load(model.train(mode)) as load_LE, torch.no_grad():
            model(input_ids=IDS)
        assert load_LE.tolist() == [[0, 24, 0, 0, 24, 0], [24, 0, 0, 0, 0, 24]]


def test_a_recorded_biased_router_gives_the_logits_that_chose_apart_from_the_clean_ones():
    model = build()
    gate.add_bias(model)
    gate.set_biases(model, BIAS)
    with routing.record(model) as routed:
        out = model(input_ids=IDS, output_router_logits=True)
    for each, logits, bias in zip(routed, out.router_logits, BIAS, strict=True):
        assert torch.equal(each.clean_TE, logits)
        torch.testing.assert_close(each.logits_TE, logits + torch.tensor(bias))
        assert each.std_TE is None


def test_biases_of_another_model_are_refused():
    model = build()
    assert gate.biases(model) == []
    gate.set_biases(model, [])
    with pytest.raises(ValueError, match=r"selection biases of \[6, 6\] experts a layer for a model that has \[\]"):
        gate.set_biases(model, BIAS)
    gate.add_bias(model)
    with pytest.raises(ValueError, match=r"of \[5, 6\] experts a layer for a model that has \[6, 6\]"):
        gate.set_biases(model, [BIAS[0][:5], BIAS[1]])


@pytest.mark.parametrize("kind", ALL)
def test_at_the_end_a_noisy_linear_router_is_the_stock_router_and_nothing_else_is_left(kind):
    stock, model = build(kind), build(kind)
    gate.add_noise(model)
    weights = dict(model.named_parameters())
    assert gate.take_out(weights) == {}
    expected = dict(stock.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ALL)
def test_a_biased_router_is_taken_out_with_its_bias_and_comes_back_from_the_file(kind, tmp_path):
    model = build(kind)
    if kind != "unnormalised":
        gate.swap_in(model, {1: lively(1)})
    gate.add_bias(model)
    gate.set_biases(model, BIAS)
    weights = dict(model.named_parameters())
    gates = gate.take_out(weights, biases=gate.biases(model))
    assert weights.keys() == dict(build(kind).named_parameters()).keys()
    assert [made.bias_E.tolist() for made in gates.values()] == torch.tensor(BIAS).tolist()
    gate.write(tmp_path, gates)
    back = build(kind)
    with torch.no_grad():
        first(back).weight.zero_()
    gate.swap_in(back, gate.read(tmp_path))
    assert gate.biases(back) == gate.biases(model)
    with torch.no_grad():
        assert torch.equal(back(input_ids=IDS).logits, model(input_ids=IDS).logits)


def with_constant(tokens, seed=0):
    """Hidden states with a direction that hardly varies, as behind a norm."""
    x_TD = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
    x_TD[:, 3] = 2 + 0.1 * x_TD[:, 3]
    return x_TD


def test_a_bias_is_folded_through_what_is_constant_in_the_hidden_states_and_lost_where_nothing_is():
    generator = torch.Generator().manual_seed(1)
    made = gate.Gate(inner_ED=torch.randn(EXPERTS, HIDDEN, generator=generator), bias_E=torch.tensor(BIAS[0]) * 5)
    router_ED, report = linear.fit(made, with_constant(2000), top_k=TOP_K, dtype=torch.float32)
    dropped = linear.report(made, made.inner_ED, with_constant(2000), top_k=TOP_K)
    assert report["agreement"] > 0.98
    assert report["r2"] > 0.999
    assert dropped["agreement"] < 0.9
    unseen = with_constant(500, seed=2)
    torch.testing.assert_close(unseen @ router_ED.T, unseen @ made.inner_ED.T + made.bias_E, atol=0.5, rtol=0)
    blind_ED, blind = linear.fit_gaussian(made, torch.ones(HIDDEN), top_k=TOP_K, dtype=torch.float32)
    assert torch.equal(blind_ED, made.inner_ED)
    assert blind["agreement"] < 0.9


def test_the_fold_of_a_bias_does_not_overfit_when_there_are_hardly_more_tokens_than_hidden_units():
    made = gate.Gate(inner_ED=torch.randn(8, 200), bias_E=torch.randn(8))
    x_TD = torch.randn(320, 200, generator=torch.Generator().manual_seed(0))
    _, report = linear.fit(made, x_TD, top_k=TOP_K, dtype=torch.float32)  # 240 tokens, and nothing constant in them
    dropped = linear.report(made, made.inner_ED, x_TD[240:], top_k=TOP_K)
    assert report["r2"] > dropped["r2"] - 0.005


def test_the_report_of_a_bias_compares_with_the_weights_of_the_logits_alone():
    made = gate.Gate(inner_ED=torch.eye(3), bias_E=torch.tensor([0.0, 2.0, 0.0]))
    x_TD = torch.tensor([[2.0, 0.5, 1.0]])  # 0 and 1 are chosen, by 2.0 and 2.5
    same = linear.report(made, torch.eye(3), x_TD, top_k=2)  # chooses 0 and 2
    assert same["agreement"] == 0.5
    one, two = 1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(-1.0))
    assert same["weight_error"] == pytest.approx((abs(one - two) + (1 - one)) / 2)
    shares = torch.tensor([2.0, 0.5, 1.0]).softmax(0)
    unnormalised = linear.report(made, torch.eye(3), x_TD, top_k=2, normalised=False)
    assert unnormalised["weight_error"] == pytest.approx(shares[1].item() / 2)


def test_the_routers_of_a_checkpoint_are_fitted_to_biased_ones(tmp_path):
    model = build("qwen3_moe")
    files.save(model, tmp_path)
    before = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    gates = {1: gate.Gate(inner_ED=routing.routers(model)[1].weight.detach() * 20, bias_E=torch.tensor(BIAS[1]) / 9)}
    fit = linear.refit(tmp_path, gates, np.random.default_rng(0).integers(0, 32, (20, 16)))
    after = load_file(tmp_path / "model.safetensors")
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.mlp.gate.weight"]
    assert fit["layers"].keys() == {"1"}
    assert fit["mean"]["agreement"] > 0.8
