"""A recipe's pipeline on a tiny model and corpus, by two processes, through a kill -9."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import documents
from tests.pretrain.conftest import ROOT
from tests.pretrain.projects import timeless, wait_for, workers
from tests.pretrain.warm_stages import stage, stages, start

pytestmark = pytest.mark.e2e

NAME = "llama-3-2-1b-shared"
STEPS, STEP_TOKENS = 8, 32 * 64
SCALED = {  # what depends on the sizes; every other setting of the recipe stays
    "tokens": STEPS * STEP_TOKENS, "seq_len": 64, "batch": 32, "processes": 2, "warmup_tokens": STEP_TOKENS,
    "eval_tokens": 2 * STEP_TOKENS, "eval_windows": 2, "save_every": 2,
}  # fmt: skip


def scaled(model: Path, data: Path) -> dict[str, Any]:
    """The recipe with a tiny model and corpus in place of its own, and counts to match."""
    content: dict[str, Any] = YAML(typ="safe").load((ROOT / f"recipes/{NAME}.yaml").read_text())
    pipeline = content["pipelines"][NAME]
    content["models"][pipeline["model"]] = {"source": f"dir:{model}", "license": "PSF-2.0"}
    corpus = content["corpora"][pipeline["corpus"]]
    corpus["heldout"] = 0.2
    for name in corpus["domains"]:
        corpus["domains"][name] = {"source": f"dir:{data}/{name}.jsonl", "format": "jsonl", "license": "PSF-2.0"}
    pipeline["mixture"]["windows"] = 4
    pipeline["partition"] |= {"calibration_windows": 8, "engines": []}  # experts of two neurons
    assert set(SCALED) <= set(pipeline["pretrain"])
    pipeline["pretrain"].update(SCALED)
    pipeline["evaluate"]["seq_len"] = SCALED["seq_len"]
    return content


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path) -> Path:
    """A project whose stages up to `partition` have run, in one process."""
    folder, data = tmp_path / "project", tmp_path / "data"
    data.mkdir()
    prose = documents("prose")
    texts = {"web": prose[::2], "wikipedia": prose[1::2], "code": documents("code")}
    for name, result in texts.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in result))
    for name in ("tasks", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    content = scaled(tiny_model, data)
    with (folder / "pipelines.yaml").open("w") as file:
        YAML().dump(content, file)
    pipeline = content["pipelines"][NAME]
    lines = [("tasks.moe.dense", pipeline["model"]), ("tasks.corpus.fingerprint", pipeline["corpus"])]
    lines += [("tasks.corpus", pipeline["corpus"]), ("tasks.mixture", NAME), ("tasks.partition", NAME)]
    stages(*lines, cwd=folder)
    return folder


def test_a_recipe_trains_with_two_processes_and_goes_on_after_kill_9(project: Path) -> None:
    run = start("tasks.pretrain", NAME, cwd=project)
    wait_for(lambda: any(project.glob(".scratch/pretrain-*/*/checkpoints/latest.json")))
    assert len(workers(project)) >= 2
    run.process.kill()
    run.wait()
    wait_for(lambda: not workers(project), seconds=20)
    done = stage("tasks.pretrain", NAME, cwd=project)
    assert done.returncode == 0, done.stderr

    run = project / "runs" / NAME
    recipe = yaml_of_the_recipe()["pretrain"]
    params = json.loads((run / "training/job.json").read_text())["params"]
    for name, value in (recipe | SCALED).items():
        result = params[name]
        assert {k: result[k] for k in value} == value if isinstance(value, dict) else result == value, name
    metrics = json.loads((run / "pretrain.json").read_text())
    assert (metrics["processes"], metrics["precision"], metrics["steps"]) == (2, "bfloat16", STEPS)
    assert metrics["resumed_from"]["step"] > 0
    log = timeless(run / "training/log.jsonl")
    steps = [record for record in log if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for record in steps:
        assert sum(domain["windows"] for domain in record["domains"].values()) == 32
        assert math.isfinite(record["loss"])
    validation = [record for record in log if record["kind"] == "validation"]
    assert [record["step"] for record in validation] == [0, 2, 4, 6, 8]
    assert validation[-1]["mean"] < validation[0]["mean"]
    weights = yaml_of_the_recipe()["mixture"]["weights"]
    for record in validation[:-1]:  # Sheared LLaMA's rule as in its paper
        above = {name: max(loss - record["references"][name], 0) for name, loss in record["losses"].items()}
        moved = {name: weights[name] * math.exp(above[name]) for name in weights}
        weights = {name: weight / sum(moved.values()) for name, weight in moved.items()}
        assert record["weights"] == pytest.approx(weights)
    assert (run / "trained/model.safetensors").is_file()


def yaml_of_the_recipe() -> dict[str, Any]:
    content = YAML(typ="safe").load((ROOT / f"recipes/{NAME}.yaml").read_text())
    pipeline: dict[str, Any] = content["pipelines"][NAME]
    return pipeline
