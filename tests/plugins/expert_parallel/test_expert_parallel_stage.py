"""The stage with the experts of a layer spread over two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from tasks.corpus.sampling import windows
from tests.pretrain.projects import configure, timeless
from tests.pretrain.warm_stages import stages

pytestmark = pytest.mark.e2e


def test_the_trained_checkpoint_is_a_stock_mixtral_with_the_logged_loss(project: Path) -> None:
    path, yaml = project / "pipelines.yaml", YAML()
    content = yaml.load(path)
    content["pipelines"]["tiny"]["partition"] |= {"target": "mixtral", "experts": 8, "shared_experts": 0}
    yaml.dump(content, path)
    configure(project, processes=2, expert_parallel=2, tokens=1024, dynamic=None, gradient_checkpointing=True)
    stages(("tasks.partition", "tiny"), ("tasks.pretrain", "tiny"), cwd=project)
    validation = [
        record for record in timeless(project / "runs/tiny/training/log.jsonl") if record["kind"] == "validation"
    ]
    assert validation[-1]["mean"] < validation[0]["mean"]
    model = AutoModelForCausalLM.from_pretrained(project / "runs/tiny/trained")
    assert model.config.model_type == "mixtral"
    for domain, ids in windows.validation(project / "data/corpora/tiny", seq_len=64, count=2).items():
        shown = torch.from_numpy(ids)
        with torch.no_grad():
            loss = model(input_ids=shown, labels=shown).loss.item()
        assert loss == pytest.approx(validation[-1]["losses"][domain], abs=1e-5)
    load = json.loads((project / "runs/tiny/training/expert_load.json").read_text())
    assert {sum(layer) for layer in load["after"]} == {2 * 2 * 64 * 4}  # domains x windows x tokens x top_k
