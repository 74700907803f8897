"""Training with two-layer gates and a bias on the choice: what it saves, and the stock checkpoint that comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.moe import gate

from .projects import configure
from .warm_stages import killed_and_whole


@pytest.mark.e2e
def test_a_killed_run_ends_with_the_same_gates_and_biases_and_a_stock_checkpoint_fitted_to_them(project: Path) -> None:
    moe, trained = project / "runs/tiny/moe", project / "runs/tiny/trained"
    router = gate.router(AutoModelForCausalLM.from_pretrained(moe))
    fresh = gate.start(*router.weight.shape, seed=0, layer=0)
    gate.write(moe, {0: fresh})  # the router of layer 1 stays linear
    configure(project, tokens=6 * 256, balance={"loss": "bias", "coefficient": 0.005, "z_loss": 0.001})
    ended = killed_and_whole(project)
    assert ended[0] == ended[1]

    gates = gate.read(trained)
    assert [gates[layer].outer_EE is None for layer in range(2)] == [False, True]
    assert not torch.equal(gates[0].inner_ED, fresh.inner_ED)
    for made in gates.values():
        assert made.bias_E is not None
        assert made.bias_E.abs().max() > 0.004  # six steps of 0.005, to and fro
        assert abs(made.bias_E.mean()) < 1e-6
    model, notes = AutoModelForCausalLM.from_pretrained(trained, output_loading_info=True)
    assert not any(notes.values())
    first, second = (gate.router(layer).weight for layer in model.model.layers)
    assert first.shape == router.weight.shape
    assert first.abs().max() > 0
    assert not torch.equal(second, gates[1].inner_ED)
    fit = json.loads((project / "runs/tiny/pretrain.json").read_text())["gate_fit"]
    assert fit["inputs"] == "text"
    assert fit["layers"].keys() == {"0", "1"}
    assert 0.8 < fit["mean"]["agreement"] <= 1
