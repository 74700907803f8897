"""Training with two-layer gates: a run that is killed, what it saves, and the stock checkpoint that comes out."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from tasks import scratch
from tasks.moe import gate
from tasks.pretrain import trainable
from tasks.settings import Pretrain

from .projects import stage, start, timeless, wait_for, workers


def test_gates_are_free_of_weight_decay_like_routers() -> None:
    config = MixtralConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    gate.swap_in(model, {0: gate.start(4, 16, seed=0, layer=0)})
    params = Pretrain(tokens=64, seq_len=8, batch=1, learning_rate=1e-3, weight_decay=0.1)
    free = {
        id(parameter)
        for group in trainable.groups(model, params)
        if not group["weight_decay"]
        for parameter in group["params"]
    }
    router = gate.router(model)
    assert len(list(router.parameters())) == 3
    assert all(id(parameter) in free for parameter in router.parameters())


@pytest.mark.e2e
def test_a_gated_run_killed_and_resumed_ends_with_the_same_gates_and_a_stock_checkpoint_fitted_to_them(
    project: Path,
) -> None:
    moe = project / "runs/tiny/moe"
    router = gate.router(AutoModelForCausalLM.from_pretrained(moe))
    fresh = {layer: gate.start(*router.weight.shape, seed=0, layer=layer) for layer in range(2)}
    gate.write(moe, fresh)
    with start("tasks.pretrain", "tiny", cwd=project) as process:
        wait_for(lambda: any(project.glob(".scratch/pretrain-tiny/*/checkpoints/latest.json")))
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: not workers(project), seconds=5)
    ended = []
    for _ in range(2):
        done = stage("tasks.pretrain", "tiny", cwd=project)
        assert done.returncode == 0, done.stderr
        ended.append(
            (scratch.digest(project / "runs/tiny/trained"), timeless(project / "runs/tiny/training/log.jsonl"))
        )
        assert stage("tasks.pretrain", "tiny", "--discard", cwd=project).returncode == 0
        if len(ended) == 1:
            assert "going on from the checkpoint" in done.stdout
    assert ended[0] == ended[1]  # the second began anew

    trained = project / "runs/tiny/trained"
    gates = gate.read(trained)
    assert gates.keys() == {0, 1}
    assert not torch.equal(gates[0].inner_ED, fresh[0].inner_ED)
    model, notes = AutoModelForCausalLM.from_pretrained(trained, output_loading_info=True)
    assert not any(notes.values())
    fitted = gate.router(model)
    assert fitted.weight.shape == router.weight.shape
    assert fitted.weight.abs().max() > 0
    fit = json.loads((project / "runs/tiny/pretrain.json").read_text())["gate_fit"]
    assert fit["inputs"] == "text"
    assert fit["layers"].keys() == {"0", "1"}
    assert 0.9 < fit["mean"]["agreement"] <= 1  # the gates are nearly linear yet
