"""`moeforge flops` and `moeforge speedup`, from configs and metrics alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows import cli
from tasks.evaluate.summary import count
from tasks.moe import counts
from tests.run_logs import COLUMNS, CONFIG

ROOT = Path(__file__).parents[2]


def said(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_flops_of_a_folder_have_a_column_for_each_top_k_that_it_serves(tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | {"elastic_top_k": [1, 2], "norm_topk_prob": False}))
    result = said("flops", str(tmp_path), "--seq-len", "100")
    assert result.exit_code == 0, result.output
    lines = {line.split("│")[1].strip(): line for line in result.output.splitlines() if "│" in line}
    for top_k in (1, 2):
        at = counts.at_top_k(config, top_k)
        assert count(counts.decode_flops(at, context=512)) in lines["decoding a token after 512"]
        assert count(counts.prompt_flops(at, tokens=100)) in lines["prompt, up to the first token"]
        assert count(counts.flops_per_token(at, seq_len=100)["train"]) in lines["training, per token"]


def test_flops_of_a_pipeline_are_those_of_parent_result_and_baseline_before_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines.yaml").write_text((ROOT / "pipelines.yaml").read_text())
    result = said("flops", "demo")
    assert result.exit_code == 0, result.output
    assert "sequences and prompts of 512 tokens" in result.output
    (line,) = [line for line in result.output.splitlines() if "forward, per token" in line]
    assert [cell.strip() for cell in line.split("│")[2:5]] == ["304.3 M", "225.0 M", "224.7 M"]
    (tmp_path / "empty").mkdir()
    assert "empty: no checkpoint here (config.json is missing)" in said("flops", "empty").output


def test_speedup_says_the_factor_or_why_there_is_none(tmp_path: Path) -> None:
    losses = {"moe": [3.0, 2.5, 2.0], "pruned": [3.5, 3.0, 2.5], "far": [6.0, 5.5, 5.0]}
    for name, loss in losses.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "pretrain.json").write_text(json.dumps({"curve": COLUMNS | {"loss": loss}}))
    run, pruned, far = (str(tmp_path / name) for name in losses)
    result = said("speedup", run, "--against", pruned)
    assert result.exit_code == 0, result.output
    assert "2.00 ×" in result.output
    assert "no factor" not in result.output
    result = said("speedup", run, "--against", far)
    assert "no factor: no loss was reached in both runs" in result.output
    missing = said("speedup", str(tmp_path), "--against", far)
    assert missing.exit_code == 1
    assert "no training run is here" in missing.output
