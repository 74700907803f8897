"""The two-layer gate: what it computes in each stock class, what it stores, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sparse_models import CONFIGS, EXPERTS, HIDDEN, SIZES, TOP_K, build, lively
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from tasks.moe import gate
from tasks.moe.routing import routers


def swapped(kind="mixtral", **options):
    model = build(kind)
    gates = {layer: lively(layer, **options) for layer in range(2)}
    gate.swap_in(model, gates)
    return model, gates


@pytest.mark.parametrize("kind", CONFIGS)
def test_in_every_stock_class_it_chooses_by_the_top_logits_and_weighs_by_their_softmax(kind):
    model, gates = swapped(kind)
    x_TD = torch.randn(50, HIDDEN)
    for router, made in zip(routers(model), gates.values(), strict=True):
        logits, weights, index = router(x_TD)
        expected = torch.tanh(x_TD.double() @ made.inner_ED.double().T) @ made.outer_EE.double().T
        best = expected.sort(1, descending=True)
        assert torch.equal(index.sort(1)[0], best.indices[:, :TOP_K].sort(1)[0])
        chosen = best.values[:, :TOP_K].exp()
        torch.testing.assert_close(weights.double(), chosen / chosen.sum(1, keepdim=True), atol=1e-6, rtol=0)
        torch.testing.assert_close(logits.double(), expected, atol=1e-6, rtol=1e-5)
        assert router.top_k == TOP_K


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_swapped_model_still_hands_out_router_logits_for_the_balance_loss_and_trains_the_gates(kind):
    model, _ = swapped(kind)
    out = model.train()(input_ids=torch.arange(20)[None], output_router_logits=True, use_cache=False)
    assert len(out.router_logits) == 2
    out.aux_loss.backward()
    for router in routers(model):
        assert all(parameter.grad.abs().sum() > 0 for parameter in router.gate.parameters())
        assert not list(router.parameters(recurse=False))


def test_a_half_precision_model_keeps_its_dtype_and_its_own_dtype_of_the_weights():
    stock, model = build(dtype=torch.bfloat16), build(dtype=torch.bfloat16)
    gate.swap_in(model, {0: lively()})
    x_TD = torch.randn(5, HIDDEN, dtype=torch.bfloat16)
    given, expected = routers(model)[0](x_TD), routers(stock)[0](x_TD)
    assert [part.dtype for part in given] == [part.dtype for part in expected]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_noise_is_drawn_in_training_alone_and_only_where_the_gate_has_noise_weights():
    x_TD = torch.randn(4000, HIDDEN)
    for noise in (True, False):
        model, gates = swapped(noise=noise)
        router = routers(model)[0]
        clean = gates[0].logits(x_TD)
        assert torch.allclose(router(x_TD)[0], clean)
        router.train()
        drawn = router(x_TD)[0] - clean
        if noise:  # softplus(0) + 0.01
            assert drawn.std().item() == pytest.approx(0.7031, rel=0.02)
            assert abs(drawn.mean().item()) < 0.02
        else:
            assert drawn.abs().max() < 1e-6


def test_a_gate_made_from_a_linear_router_chooses_the_same_experts():
    model = build()
    router_ED = torch.randn(EXPERTS, HIDDEN) * 0.1
    made = gate.from_linear(router_ED)
    gate.swap_in(model, {0: made})
    x_TD = torch.randn(200, HIDDEN)
    logits, _, index = routers(model)[0](x_TD)
    assert torch.equal(index, (x_TD @ router_ED.T).topk(TOP_K, dim=1).indices)
    assert (logits - x_TD @ router_ED.T).abs().max() < (x_TD @ router_ED.T).abs().max() ** 3 / 3
    assert made.noise_ED is None


def test_a_fresh_gate_depends_on_seed_and_layer_alone():
    one = gate.start(64, 128, seed=3, layer=1)
    again = gate.start(64, 128, seed=3, layer=1)
    assert torch.equal(one.inner_ED, again.inner_ED)
    assert torch.equal(one.outer_EE, again.outer_EE)
    for other in (gate.start(64, 128, seed=4, layer=1), gate.start(64, 128, seed=3, layer=2)):
        assert not torch.equal(one.inner_ED, other.inner_ED)
    assert one.inner_ED.std().item() == pytest.approx(0.02, rel=0.05)
    assert not one.noise_ED.any()


@given(
    st.dictionaries(st.integers(0, 40), st.booleans(), max_size=4), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_gates_come_back_from_the_file_as_they_were(tmp_path_factory, noisy, dtype):
    folder = tmp_path_factory.mktemp("gates")
    gates = {
        layer: gate.Gate(
            inner_ED=torch.randn(3, 5, dtype=dtype),
            outer_EE=torch.randn(3, 3, dtype=dtype),
            noise_ED=torch.randn(3, 5, dtype=dtype) if noise else None,
        )
        for layer, noise in noisy.items()
    }
    gate.write(folder, gates)
    read = gate.read(folder)
    assert list(read) == sorted(gates)
    for layer, made in gates.items():
        assert torch.equal(read[layer].inner_ED, made.inner_ED)
        assert torch.equal(read[layer].outer_EE, made.outer_EE)
        assert (read[layer].noise_ED is None) == (made.noise_ED is None)
    assert (folder / gate.FILE).stat().st_mode & 0o044 == 0o044


def test_a_folder_without_the_file_has_no_gates(tmp_path):
    assert gate.read(tmp_path) == {}


def test_gates_are_taken_out_of_a_trained_model_and_leave_the_names_of_the_stock_class():
    for kind in CONFIGS:
        stock = {name for name, _ in build(kind).named_parameters()}
        model, gates = swapped(kind)
        weights = dict(model.named_parameters())
        taken = gate.take_out(weights)
        assert set(weights) == stock
        assert all(torch.equal(taken[layer].inner_ED, gates[layer].inner_ED) for layer in range(2))
        assert all(torch.equal(taken[layer].outer_EE, gates[layer].outer_EE) for layer in range(2))
        assert all(taken[layer].noise_ED is not None for layer in range(2))
        router = next(name for name in stock if name.endswith((".gate.weight", "router.weight")))
        assert weights[router].shape == (EXPERTS, HIDDEN)
    assert gate.take_out({"model.layers.0.mlp.gate.weight": torch.zeros(2, 2)}) == {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("layers.0.gate.2.weight"), r"gates.safetensors: layers.0.gate.2.weight is missing"),
        (lambda t: t.update(other=torch.zeros(1)), r"gates.safetensors: unknown tensors \['other'\]"),
    ],
)
def test_a_file_that_lacks_or_has_too_many_tensors_is_refused_by_name(tmp_path, spoil, message):
    gate.write(tmp_path, {0: lively()})
    tensors = load_file(tmp_path / gate.FILE)
    spoil(tensors)
    save_file(tensors, tmp_path / gate.FILE)
    with pytest.raises(ValueError, match=message):
        gate.read(tmp_path)


def test_a_file_that_is_cut_short_is_refused_by_name(tmp_path):
    gate.write(tmp_path, {0: lively()})
    content = (tmp_path / gate.FILE).read_bytes()
    (tmp_path / gate.FILE).write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"gates.safetensors: damaged or cut short"):
        gate.read(tmp_path)


def test_a_gate_that_does_not_fit_is_refused_with_its_layer():
    small = gate.start(EXPERTS, HIDDEN - 1, seed=0, layer=0)
    with pytest.raises(ValueError, match=r"layer 1: gate.0.weight is \[6, 15\], the router's \[6, 16\]"):
        gate.swap_in(build(), {1: small})
    with pytest.raises(ValueError, match="layer 2 is not there; the model has layers 0 to 1"):
        gate.swap_in(build(), {2: lively()})
    model = build("qwen2_moe")
    routers(model)[0].norm_topk_prob = False
    with pytest.raises(ValueError, match="norm_topk_prob"):
        gate.swap_in(model, {0: lively()})


def test_a_gate_for_a_dense_layer_is_refused():
    config = Qwen2MoeConfig(
        num_experts=EXPERTS, moe_intermediate_size=8, norm_topk_prob=True, shared_expert_intermediate_size=8,
        mlp_only_layers=[0], **SIZES,
    )  # fmt: skip
    with pytest.raises(ValueError, match="layer 0: the layer is dense"):
        gate.swap_in(AutoModelForCausalLM.from_config(config), {0: lively()})
