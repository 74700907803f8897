"""record: what the routers of every class did in one forward pass, with gradients, and never of a recomputation."""

import pytest
import torch
from sparse_models import CONFIGS, TOP_K, UNNORMALISED, build, lively
from transformers import AutoModelForCausalLM, LlamaConfig

from tasks.moe import gate, routing
from tasks.moe.internals import layers

IDS = torch.arange(24).view(2, 12)


def forward(model, ids=IDS):
    with routing.record(model) as routed:
        out = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
    return routed, out


@pytest.mark.parametrize("kind", CONFIGS | UNNORMALISED)
def test_of_a_stock_class_it_holds_the_logits_choice_and_weights_that_the_experts_used(kind):
    model = build(kind)
    seen = []
    for router in routing.routers(model):
        router.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    used = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, args: used.append(args[1:3]))
    routed, out = forward(model)
    assert len(routed) == 2
    for layer, each in enumerate(routed):
        expected = seen[layer].double() @ routing.routers(model)[layer].weight.double().T
        torch.testing.assert_close(each.clean_TE.double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(each.logits_TE, out.router_logits[layer])
        assert each.std_TE is None
        assert torch.equal(each.chosen_TK, used[layer][0])
        assert torch.equal(each.weights_TK, used[layer][1])
        probabilities = expected.softmax(1).gather(1, each.chosen_TK)
        if kind != "unnormalised":
            probabilities = probabilities / probabilities.sum(1, keepdim=True)
        torch.testing.assert_close(each.weights_TK.double(), probabilities, atol=1e-6, rtol=1e-5)
        for tensor in (each.clean_TE, each.logits_TE, each.weights_TK):
            (gradient,) = torch.autograd.grad(
                tensor.square().sum(), routing.routers(model)[layer].weight, retain_graph=True
            )
            assert gradient.abs().sum() > 0
        assert each.chosen_TK.shape == (IDS.numel(), TOP_K)


def test_of_a_noisy_gate_it_tells_the_clean_logits_from_those_that_chose_and_gives_the_deviation():
    model = build().train()
    gate.swap_in(model, {0: lively(0), 1: lively(1, noise=False)})
    routed, out = forward(model)
    noisy, quiet = routed
    assert torch.equal(noisy.logits_TE, out.router_logits[0])
    torch.testing.assert_close(noisy.std_TE, torch.full_like(noisy.std_TE, 0.7031472))
    drawn = (noisy.logits_TE - noisy.clean_TE) / noisy.std_TE
    assert 0.8 < drawn.std() < 1.2
    assert quiet.std_TE is None
    assert torch.equal(quiet.logits_TE, quiet.clean_TE)


def test_a_recomputation_under_gradient_checkpointing_is_neither_recorded_nor_counted_and_draws_the_same_noise():
    plain, checkpointed = build().train(), build().train()
    layers.recompute_activations(checkpointed)
    gradients = []
    for model in (plain, checkpointed):
        gate.swap_in(model, {0: lively()})
        gate.add_noise(model)
        torch.manual_seed(3)
        runs = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        with routing.record(model) as routed, routing.expert_load(model) as load_LE:
            out = model(input_ids=IDS, labels=IDS, use_cache=False)
            (out.loss + sum(each.std_TE.mean() + each.logits_TE.square().mean() for each in routed)).backward()
        assert len(runs) == (1 if model is plain else 2)
        assert len(routed) == 2
        assert (load_LE.sum(1) == IDS.numel() * TOP_K).all()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("noise" in name for name in gradients[0])
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


def test_after_the_block_nothing_is_recorded_and_nothing_is_kept():
    model = build()
    gate.add_noise(model)
    routed, _ = forward(model)
    forward(model)
    assert len(routed) == 2
    for router in routing.routers(model):
        assert not router.observers
        assert not [hook for hook in router._forward_hooks.values() if "_read" in hook.__qualname__]


def test_a_dense_model_records_nothing():
    dense = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with routing.record(dense) as routed:
        dense(input_ids=IDS)
    assert routed == []


def test_a_router_class_with_another_output_is_read_by_its_registered_reader(monkeypatch):
    model = build()

    def reader(router, give):
        def hook(_module, _inputs, output):
            logits, weights, chosen = output
            give(
                routing.Routed(
                    clean_TE=logits, logits_TE=logits, std_TE=None, weights_TK=weights, chosen_TK=5 - chosen
                )
            )

        return [router.register_forward_hook(hook)]

    monkeypatch.setitem(routing.readers, "MixtralTopKRouter", reader)
    with routing.expert_load(model) as other_LE:
        routed, _ = forward(model)
    monkeypatch.undo()
    with routing.expert_load(model) as load_LE:
        plain, _ = forward(model)
    assert torch.equal(routed[1].chosen_TK, 5 - plain[1].chosen_TK)
    assert (other_LE == load_LE[:, ::-1]).all()
