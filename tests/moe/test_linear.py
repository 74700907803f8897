"""The linear router that comes nearest to a two-layer gate: how near, by what measure, and where it is written."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tasks.moe import files, gate, linear
from tests import models

EXPERTS, HIDDEN, TOP_K = 8, 24, 2


def gate_of(size):
    """`size` is the standard deviation of its inner logits: 0.1 is nearly linear, 3 mostly flat."""
    made = gate.start(EXPERTS, HIDDEN, seed=0, layer=0)
    inner = made.inner_ED / made.inner_ED.norm(dim=1, keepdim=True) * size
    return gate.Gate(inner_ED=inner, outer_EE=made.outer_EE * 50)


def inputs(tokens=8192, seed=0):
    """Correlated inputs, unlike the Gaussian ones."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(9)) / HIDDEN**0.5
    return torch.randn(tokens, HIDDEN, generator=generator) @ mix


def test_a_nearly_linear_gate_is_fitted_without_a_loss_and_a_flat_one_with_a_reported_one():
    reports = [linear.fit(gate_of(size), inputs(), top_k=TOP_K, dtype=torch.float32)[1] for size in (0.05, 1, 4)]
    near, middle, far = (report["agreement"] for report in reports)
    assert near > 0.99 > middle > far > 2 * TOP_K / EXPERTS
    assert reports[0]["r2"] > 0.999 > reports[1]["r2"] > reports[2]["r2"] > 0.5
    assert reports[0]["weight_error"] < reports[1]["weight_error"] < reports[2]["weight_error"]


def test_the_fit_is_the_least_squares_mix_of_the_first_layer():
    made, x_TD = gate_of(1), inputs(4096)
    fitted, _ = linear.fit(made, x_TD, top_k=TOP_K, dtype=torch.float32)
    inner = (x_TD[:3072] @ made.inner_ED.T).double()
    logits = torch.tanh(inner) @ made.outer_EE.double().T
    target = (logits - logits.mean(1, keepdim=True)).numpy()
    mix = np.linalg.lstsq(inner.numpy(), target, rcond=None)[0].T
    np.testing.assert_allclose(fitted.numpy(), mix @ made.inner_ED.double().numpy(), atol=1e-4 * np.abs(mix).max())


def test_it_keeps_no_fewer_choices_on_other_tokens_than_least_squares_over_all_routers():
    made, x_TD, others = gate_of(1), inputs(600), inputs(4096, seed=1)
    fitted, _ = linear.fit(made, x_TD, top_k=TOP_K, dtype=torch.float32)
    logits = made.logits(x_TD[:450])
    free = torch.linalg.lstsq(x_TD[:450], logits - logits.mean(1, keepdim=True)).solution.T
    ours, theirs = (linear.report(made, router, others, top_k=TOP_K) for router in (fitted, free))
    assert ours["agreement"] > theirs["agreement"]


def test_without_text_the_fit_is_the_least_squares_one_of_many_gaussian_inputs():
    made, norm_D = gate_of(1), torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.5
    fitted, report = linear.fit_gaussian(made, norm_D, top_k=TOP_K, dtype=torch.float32)
    x_TD = torch.randn(200_000, HIDDEN, generator=torch.Generator().manual_seed(2)) * norm_D
    expected, by_sampling = linear.fit(made, x_TD, top_k=TOP_K, dtype=torch.float32)
    assert (fitted - expected).norm() < 0.03 * expected.norm()
    assert report["agreement"] == pytest.approx(by_sampling["agreement"], abs=0.02)
    again, _ = linear.fit_gaussian(made, norm_D, top_k=TOP_K, dtype=torch.float32)
    assert torch.equal(fitted, again)


def test_the_report_counts_choices_and_weights_as_a_loop_does():
    made, x_TD = gate_of(2), inputs(64)
    router_ED = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(3))
    kept, difference = 0, 0.0
    for x in x_TD:
        wanted, fitted = made.logits(x[None])[0], router_ED @ x
        chosen = [set(logits.topk(TOP_K).indices.tolist()) for logits in (wanted, fitted)]
        kept += len(chosen[0] & chosen[1])
        for expert in chosen[0]:
            one = (wanted[expert] - torch.logsumexp(wanted[list(chosen[0])], 0)).exp()
            other = (fitted[expert] - torch.logsumexp(fitted[list(chosen[1])], 0)).exp() if expert in chosen[1] else 0
            difference += abs(float(one) - float(other))
    report = linear.report(made, router_ED, x_TD, top_k=TOP_K)
    assert report["agreement"] == pytest.approx(kept / (64 * TOP_K))
    assert report["weight_error"] == pytest.approx(difference / (64 * TOP_K), rel=1e-4)


@pytest.mark.parametrize("text", [True, False])
def test_the_routers_of_a_checkpoint_are_overwritten_and_nothing_else(tmp_path, text):
    model = models.build("mixtral", dtype=torch.bfloat16, varied=False, hidden_size=HIDDEN, num_local_experts=EXPERTS)
    files.save(model, tmp_path)
    before = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    gates = {1: gate_of(1)}
    ids_BL = np.random.default_rng(0).integers(0, 64, (40, 32))
    fitted = linear.refit(tmp_path, gates, ids_BL if text else None)
    after = load_file(tmp_path / "model.safetensors")
    assert [name for name in after if not torch.equal(before[name], after[name])] == [
        "model.layers.1.block_sparse_moe.gate.weight"
    ]
    assert fitted["inputs"] == ("text" if text else "gaussian")
    assert fitted["layers"].keys() == {"1"}
    assert fitted["mean"] == fitted["layers"]["1"]

    seen = []
    model = model.float().eval()
    gate.router(model.model.layers[1]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=torch.from_numpy(ids_BL))
    router_ED = after["model.layers.1.block_sparse_moe.gate.weight"]
    report = linear.report(gates[1], router_ED, seen[0].flatten(0, -2), top_k=TOP_K)
    assert report["agreement"] > 0.7
    if text:  # and better than without
        norm_D = before["model.layers.1.post_attention_layernorm.weight"]
        blind, _ = linear.fit_gaussian(gates[1], norm_D, top_k=TOP_K, dtype=torch.bfloat16)
        assert report["r2"] > linear.report(gates[1], blind, seen[0].flatten(0, -2), top_k=TOP_K)["r2"]
