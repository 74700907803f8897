from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import scratch
from tasks.moe import checkpoint, files, gate
from tasks.plugins.proxy_runs import models
from tasks.settings import Proxy
from tests.moe import sparse_models

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def sparse(folder: Path) -> Path:
    """A checkpoint of two sparse layers."""
    folder.mkdir()
    files.save(sparse_models.build("qwen3_moe"), folder)
    return folder


def proxy(**fields: Any) -> Proxy:
    return Proxy.model_validate({"model": "scratch", "tokens": 512, "learning_rate": 1e-3} | fields)


def test_a_model_from_scratch_is_small_random_and_has_the_parents_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    made = [
        models.make(proxy(seed=seed), parent=tiny_model, student=tmp_path, folder=tmp_path / f"{i}")
        for i, seed in enumerate((0, 0, 1))
    ]
    digests = [scratch.digest(folder / "model.safetensors") for folder in made]
    assert (digests[0] == digests[1], digests[0] == digests[2]) == (True, False)
    config = json.loads((made[0] / "config.json").read_text())
    assert (config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]) == (512, 128, 4)
    text = "def quick(): return 7"
    own, parents = (AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (made[0], tiny_model))
    assert own == parents


def test_whole_models_are_taken_where_they_are_and_a_missing_one_names_its_stage(
    tiny_model: Path, tmp_path: Path
) -> None:
    whole = models.make(proxy(model="parent"), parent=tiny_model, student=tmp_path, folder=tmp_path)
    assert (whole, list(tmp_path.glob("proxy-*"))) == (tiny_model, [])
    with pytest.raises(FileNotFoundError, match=r"moe: not found; run the stage `partition` first"):
        models.make(proxy(model="student"), parent=tiny_model, student=tmp_path / "moe", folder=tmp_path)
    with pytest.raises(ValueError, match=r"mixture.proxy.layers = 3: .* has 2; set it to that or less"):
        models.make(proxy(model="parent", layers=3), parent=tiny_model, student=tmp_path, folder=tmp_path / "proxy")


@pytest.mark.parametrize("kind", ["parent", "student"])
def test_the_first_layers_compute_what_they_do_in_the_whole_model(tiny_model: Path, tmp_path: Path, kind: Any) -> None:
    student = sparse(tmp_path / "moe") if kind == "student" else tmp_path
    source = student if kind == "student" else tiny_model
    cut = models.make(proxy(model=kind, layers=1), parent=tiny_model, student=student, folder=tmp_path)
    whole, part = AutoModelForCausalLM.from_pretrained(source).eval(), checkpoint.load(cut)
    with torch.no_grad():
        after_one = whole.base_model(IDS, output_hidden_states=True).hidden_states[1]
        own = part.base_model.embed_tokens(IDS)
        assert len(part.base_model.layers) == 1
        hidden = part.base_model(IDS).last_hidden_state
        assert own.shape == after_one.shape
        torch.testing.assert_close(hidden, whole.base_model.norm(after_one), atol=1e-5, rtol=1e-4)


def test_gates_of_the_layers_that_stay_go_with_them(tmp_path: Path) -> None:
    student = sparse(tmp_path / "moe")
    gate.write(student, {i: sparse_models.lively(i) for i in range(2)})
    cut = models.make(proxy(model="student", layers=1), parent=student, student=student, folder=tmp_path)
    assert list(gate.read(cut)) == [0]
