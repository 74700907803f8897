"""What nobody can have is said by `moeforge plan`, and stops `moeforge run` before its first stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from flows import cli, dag, preflight, retrain, upcycle
from tasks import settings
from tests.flows.conftest import ROOT

COMMIT = "0123456789" * 4


def recipe(**domain: str) -> settings.Settings:
    """The modern recipe with one domain changed."""
    raw: Any = YAML(typ="safe", pure=True).load((ROOT / "recipes/llama-3-2-1b-shared.yaml").read_text())
    raw["corpora"]["web-wiki-code"]["domains"]["web"] |= domain
    return settings.validate(raw)


def test_datasets_with_a_loading_script_are_refused_domain_or_task(hub_listing: dict[str, list[str]]) -> None:
    name = "llama-3-2-1b-shared"
    for dataset in ("allenai/sciq", "baber/piqa", "allenai/ai2_arc", "Rowan/hellaswag"):
        hub_listing[dataset] = ["README.md", "data/test.parquet"]
    hub_listing[f"org/scripted@{COMMIT}"] = ["scripted.py"]
    config = recipe()
    preflight.require(config, name)
    hub_listing["Rowan/hellaswag"] = ["README.md", "hellaswag.py"]
    config = recipe(source=f"hub:org/scripted@{COMMIT}", format="dataset")
    with pytest.raises(settings.SettingsError) as error:
        preflight.require(config, name)
    first, second = str(error.value).splitlines()
    assert first.startswith("corpora.web-wiki-code, domain web: source 'hub:org/scripted@0123")
    assert "loading script (scripted.py)" in first
    assert second.startswith(
        f"pipelines.{name}.evaluate.tasks: lm-eval reads hellaswag from hub:Rowan/hellaswag, which"
    )


def test_a_shape_that_an_engine_cannot_load_is_refused_with_near_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings.load(ROOT / "pipelines.yaml")
    partition = config.pipeline("fine").partition.model_copy(
        update={"engines": ["llama.cpp"], "experts": 144, "shared_experts": 48, "top_k": 48}
    )
    fine = config.pipeline("fine").model_copy(update={"partition": partition})
    monkeypatch.setitem(config.pipelines, "fine", fine)
    (refusal,) = preflight.refusals(config, "fine")
    assert refusal.startswith("pipelines.fine.partition: engines: llama.cpp cannot run the granitemoeshared: 48")
    assert "experts: 18, shared_experts: 6, top_k: 6" in refusal
    with pytest.raises(settings.SettingsError, match="cannot run the granitemoeshared"):
        preflight.require(config, "fine")


def test_too_few_evaluations_to_move_weights_by_are_warned_of_with_a_number() -> None:
    config = settings.load(ROOT / "pipelines.yaml")
    assert preflight.training(config.pipeline("fine").pretrain) == []
    fine = config.pipeline("fine").pretrain.model_copy(update={"eval_tokens": 16384})
    (line,) = preflight.training(fine)
    assert "the weights move at 3 evaluations alone" in line
    assert "set pretrain.eval_tokens to 3072 or less" in line
    rare = config.model_copy(
        update={"pipelines": {"fine": config.pipeline("fine").model_copy(update={"pretrain": fine})}}
    )
    assert preflight.warnings(rare, "fine")[0] == line
    assert preflight.training(settings.Pretrain(**fine.model_dump() | {"eval_tokens": 3072})) == []
    assert preflight.training(config.pipeline("demo").pretrain) == []


def test_a_hub_out_of_reach_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    preflight.require(recipe(source=f"hub:org/scripted@{COMMIT}", format="dataset"), "llama-3-2-1b-shared")


def test_no_recipe_names_a_task_whose_dataset_is_a_script() -> None:
    """EleutherAI/logiqa is one: lm-evaluation-harness issue 3171."""
    assert preflight.dataset_of("logiqa") == "EleutherAI/logiqa"
    for path in (ROOT / "recipes").glob("llama*.yaml"):
        for pipeline in settings.load(path).pipelines.values():
            names = [task.name for task in pipeline.evaluate.tasks]
            assert "EleutherAI/logiqa" not in [preflight.dataset_of(name) for name in names if "logiqa" in name]


def test_run_stops_before_the_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "recipes/llama-2-7b-random-2of8.yaml", "pipelines.yaml")
    monkeypatch.setattr(dag, "ancestors", lambda target: [])
    monkeypatch.setattr(dag, "refresh_code", lambda names: None)
    monkeypatch.setattr(dag, "changes", lambda names: {target: ["never run"] for target in ["model@llama-2-7b"]})
    said = CliRunner().invoke(cli.app, ["run", "llama-2-7b-random-2of8"])
    assert said.exit_code == 1
    refusal = "corpora.slimpajama: the source of cc, c4, github"
    assert f"moeforge: {refusal}" in said.stderr
    for flow in (upcycle.upcycle, retrain.retrain):  # as a deployment calls them
        with pytest.raises(settings.SettingsError, match=refusal):
            flow.fn(pipeline="llama-2-7b-random-2of8")
