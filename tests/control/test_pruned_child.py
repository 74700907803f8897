"""A dense child of another shape, by masks that are trained, through the stage's command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tasks import scratch
from tests.pretrain.conftest import made_once
from tests.pretrain.projects import wait_for, workers
from tests.pretrain.warm_stages import stage, start

pytestmark = pytest.mark.e2e

OWN = {"num_hidden_layers": 2, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128}
SHAPE = {"num_hidden_layers": 1, "num_key_value_heads": 1, "hidden_size": 48, "intermediate_size": 64}
STEPS = 80


def set_control(project: Path, control: dict[str, Any]) -> None:
    path, yaml = project / "pipelines.yaml", YAML()
    content = yaml.load(path)
    content["pipelines"]["tiny"]["control"] = control
    content["pipelines"]["tiny"]["pretrain"].update(save_every=40, eval_tokens=12_800, micro_batch=4)
    yaml.dump(content, path)


def masks(tokens: int = STEPS * 256) -> dict[str, Any]:
    shape = {name: size for name, size in SHAPE.items() if name != "intermediate_size"}  # the active width by itself
    return {"method": "hard_concrete", "tokens": tokens, "shape": shape}


@pytest.fixture(scope="module")
def made(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project with the child of an uninterrupted run."""

    def make(folder: Path) -> None:
        shutil.copytree(finished, folder)
        set_control(folder, masks())
        done = stage("tasks.control", "tiny", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "masks after 20,480 tokens: hidden_size " in done.stdout

    return made_once(tmp_path_factory, "pruned", make)


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


def metrics(project: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((project / "runs/tiny/control.json").read_text())
    return content


def test_the_masks_come_to_their_targets_and_the_child_has_exactly_the_shape(made: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known, root = metrics(made), made / "runs/tiny/control"
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
    assert known["masks"]["tokens"] == STEPS * 256
    log = [json.loads(line) for line in (root / "masks/training/log.jsonl").read_text().splitlines()]
    assert sum(record["kind"] == "step" for record in log) == STEPS
    assert not any((made / ".scratch").glob("control-tiny/*/"))


def test_killed_while_masks_train_and_after_the_cut_it_ends_with_the_same_bytes(project: Path, made: Path) -> None:
    set_control(project, masks())

    def killed(pattern: str) -> None:
        run = start("tasks.control", "tiny", cwd=project)
        wait_for(lambda: any(project.glob(f".scratch/control-tiny/*/{pattern}")))
        run.process.kill()
        run.wait()
        wait_for(lambda: not workers(project), seconds=20)

    killed("masks/checkpoints/step-00000040")
    killed("split")
    assert stage("tasks.control", "tiny", cwd=project).returncode == 0
    assert scratch.digest(project / "runs/tiny/control") == scratch.digest(made / "runs/tiny/control")
    assert metrics(project)["masks"] == metrics(made)["masks"]


def test_a_baseline_has_the_same_shape_without_masks(project: Path) -> None:
    set_control(project, {"method": "magnitude", "shape": SHAPE})
    assert stage("tasks.control", "tiny", cwd=project).returncode == 0
    known = metrics(project)
    assert known["method"] == "magnitude"
    assert known["shape"] == {**SHAPE, "num_attention_heads": 2}
    assert len(known["layers"]) == 1
    assert "masks" not in known
    assert not (project / "runs/tiny/control/masks").exists()
