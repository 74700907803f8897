"""A pruned baseline of another shape by trained masks, through the stage's command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks import scratch
from tasks.plugins.dynamic.settings import Dynamic
from tasks.plugins.masks import cost
from tasks.settings import Pretrain
from tasks.settings.pretrain import Distill
from tests.control.conftest import baseline_of, kill_when, metrics, set_control, unfinished
from tests.pretrain.warm_stages import stage

BASE = Pretrain(tokens=4096, seq_len=64, batch=4, micro_batch=2, processes=2, learning_rate=1e-3)
OWN = {"num_hidden_layers": 2, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128}
SHAPE = {"num_hidden_layers": 1, "num_key_value_heads": 1, "hidden_size": 48, "intermediate_size": 64}
MASKED_STEPS = 80


@pytest.fixture(scope="module")
def pruned(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project with a baseline of another shape, by masks."""
    said = "masks after 20,480 tokens: hidden_size "
    return baseline_of(finished, tmp_path_factory, "pruned", said=said, prepare=set_masks)


def set_masks(project: Path) -> None:
    shape = {name: size for name, size in SHAPE.items() if name != "intermediate_size"}  # the active width by itself
    set_shape(project, {"method": "hard_concrete", "tokens": MASKED_STEPS * 256, "shape": shape})


def set_shape(project: Path, control: dict[str, Any]) -> None:
    set_control(project, control, save_every=40, eval_tokens=12_800, micro_batch=4)


def test_masks_are_trained_on_other_batches_by_the_papers_schedule_with_a_rate_of_their_own() -> None:
    sparse = BASE.model_copy(update={"learning_rates": {"experts": 2e-3}, "distill": Distill(), "dynamic": Dynamic()})
    masks = cost.mask_training(sparse, tokens=25_600)
    assert (masks.steps, masks.warmup_steps, masks.schedule, masks.final_lr_share) == (100, 10, "cosine", 0.1)
    assert masks.learning_rates == {"ffn": 2e-3, "masks": 1.0}
    assert (masks.weight_decay, masks.distill, masks.dynamic, masks.seed) == (0.0, None, None, BASE.seed + 1)
    Pretrain.model_validate(masks.model_dump())


@pytest.mark.e2e
def test_the_masks_come_to_their_targets_and_the_child_has_exactly_the_shape(pruned: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known, root = metrics(pruned), pruned / "runs/tiny/control"
    assert known["masks"]["size"].keys() == SHAPE.keys()
    for field, size in known["masks"]["size"].items():
        assert size["target"] == SHAPE[field]
        assert abs(size["expected"] - size["target"]) <= 0.01 * OWN[field], field
    for name in ("split", "model"):
        model = AutoModelForCausalLM.from_pretrained(root / name)
        config = model.config
        assert {field: getattr(config, field) for field in SHAPE} == SHAPE
        assert (config.num_attention_heads, config.head_dim, config.tie_word_embeddings) == (2, 16, True)
        assert model.num_parameters() == known["parameters"]
        AutoTokenizer.from_pretrained(root / name)
    kept = {
        name: (mask != 0).sum(-1).flatten().tolist() for name, mask in load_file(root / "kept.safetensors").items()
    }
    assert kept == {"layer_L": [1], "group_LK": [1, 1], "neuron_LN": [64, 64], "hidden_D": [48]}
    assert known["identity_error"] <= 1e-5
    assert known["loss"]["trained"]["mean"] < known["loss"]["cut"]["mean"]
    assert known["seconds"].keys() == {"masks", "cut", "training"}
    assert known["masks"]["tokens"] == MASKED_STEPS * 256
    log = [json.loads(line) for line in (root / "masks/training/log.jsonl").read_text().splitlines()]
    assert sum(record["kind"] == "step" for record in log) == MASKED_STEPS
    assert not any((pruned / ".scratch").glob("control-tiny/*/"))


@pytest.mark.e2e
def test_killed_while_masks_train_and_after_the_cut_it_ends_with_the_same_bytes(project: Path, pruned: Path) -> None:
    set_masks(project)
    kill_when(project, lambda: unfinished(project, "masks/checkpoints/step-00000040"))
    kill_when(project, lambda: unfinished(project, "split"))
    assert stage("tasks.control", "tiny", cwd=project).returncode == 0
    assert scratch.digest(project / "runs/tiny/control") == scratch.digest(pruned / "runs/tiny/control")
    assert metrics(project)["masks"] == metrics(pruned)["masks"]


@pytest.mark.e2e
def test_a_baseline_has_the_same_shape_without_masks(project: Path) -> None:
    set_shape(project, {"method": "magnitude", "shape": SHAPE})
    assert stage("tasks.control", "tiny", cwd=project).returncode == 0
    known = metrics(project)
    assert known["method"] == "magnitude"
    assert known["shape"] == {**SHAPE, "num_attention_heads": 2}
    assert len(known["layers"]) == 1
    assert "masks" not in known
    assert not (project / "runs/tiny/control/masks").exists()
