"""Training with a bias on the choice: a run that is killed, and the stock checkpoint that comes out."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks import scratch
from tasks.moe import gate
from tests.pretrain.projects import configure, stage, start, timeless, wait_for, workers


@pytest.mark.e2e
def test_a_biased_run_killed_and_resumed_ends_with_the_same_biases_and_a_stock_checkpoint_fitted_to_them(
    project: Path,
) -> None:
    configure(project, tokens=6 * 256, balance={"loss": "bias", "coefficient": 0.005, "z_loss": 0.001})
    with start("tasks.pretrain", "tiny", cwd=project) as process:
        wait_for(lambda: any(project.glob(".scratch/pretrain-tiny/*/checkpoints/latest.json")))
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: not workers(project), seconds=20)
    ended = []
    for _ in range(2):
        done = stage("tasks.pretrain", "tiny", cwd=project)
        assert done.returncode == 0, done.stderr
        assert ("going on from the checkpoint" in done.stdout) == (not ended)
        ended.append(
            (scratch.digest(project / "runs/tiny/trained"), timeless(project / "runs/tiny/training/log.jsonl"))
        )
        assert stage("tasks.pretrain", "tiny", "--discard", cwd=project).returncode == 0
    assert ended[0] == ended[1]  # the second began anew

    trained = project / "runs/tiny/trained"
    gates = gate.read(trained)
    for made in gates.values():
        assert made.outer_EE is None
        assert made.bias_E is not None
        assert made.bias_E.abs().max() > 0.004  # six steps of 0.005, to and fro
        assert abs(made.bias_E.mean()) < 1e-6
    model, notes = AutoModelForCausalLM.from_pretrained(trained, output_loading_info=True)
    assert not any(notes.values())
    fitted = gate.router(model.model.layers[0]).weight
    assert not torch.equal(fitted, gates[0].inner_ED)
    fit = json.loads((project / "runs/tiny/pretrain.json").read_text())["gate_fit"]
    assert fit["layers"].keys() == {str(layer) for layer in gates}
    assert fit["mean"]["agreement"] > 0.8
