"""`moeforge import`: what it prints and writes, on a hand-made v1 checkpoint with the tiny model's tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flows import cli
from tasks.moe import gate
from tests.corpus.conftest import byte_level, corpus, finished_project

__all__ = ["byte_level", "corpus", "finished_project"]

HIDDEN, EXPERTS, SIZE, LAYERS, VOCAB = 16, 4, 8, 2, 512


def checkpoint(folder: Path, tokenizer: Path | None = None, **fields: Any) -> Path:
    """A random LLaMA-MoE v1 checkpoint."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    tensors = {"model.embed_tokens.weight": weight(VOCAB, HIDDEN), "lm_head.weight": weight(VOCAB, HIDDEN)}
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    for i in range(LAYERS):
        layer, gate = f"model.layers.{i}", f"model.layers.{i}.mlp.gate"
        tensors |= {f"{layer}.self_attn.{name}_proj.weight": weight(HIDDEN, HIDDEN) for name in "qkvo"}
        tensors |= {f"{layer}.{norm}_layernorm.weight": torch.ones(HIDDEN) for norm in ("input", "post_attention")}
        tensors[f"{gate}.gate_network.0.weight"] = weight(EXPERTS, HIDDEN)
        tensors[f"{gate}.gate_network.2.weight"] = weight(EXPERTS, EXPERTS)
        tensors[f"{gate}.weight_noise.weight"] = weight(EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            experts = f"{layer}.mlp.calculator.experts.weight"
            tensors |= {f"{experts}_{part}.{e}": weight(SIZE, HIDDEN) for part in ("gate", "up")}
            tensors[f"{experts}_down.{e}"] = weight(HIDDEN, SIZE)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama_moe", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": EXPERTS * SIZE,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "num_experts": EXPERTS, "num_selects": 2, "score_scale_factor": 2.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | fields))
    for path in tokenizer.glob("*token*") if tokenizer else ():
        shutil.copy(path, folder)
    return folder


def test_its_help_has_an_example() -> None:
    result = CliRunner().invoke(cli.app, ["import", "--help"])
    assert "Example: moeforge import" in result.output


def test_an_import_prints_what_it_read_how_well_the_routers_fit_and_where_it_wrote(tmp_path: Path) -> None:
    source, target = checkpoint(tmp_path / "source"), tmp_path / "new"
    result = CliRunner().invoke(cli.app, ["import", str(source), str(target)])
    assert result.exit_code == 0, result.output
    read, fitted, wrote = result.output.splitlines()[-3:]
    parameters = AutoModelForCausalLM.from_pretrained(target).num_parameters()
    assert f"source: LLaMA-MoE v1, {parameters:,} parameters; 2 layers of 4 experts, 2 for each token" in read
    assert "Gaussian inputs, for lack of a --corpus: they make " in fitted
    assert fitted.endswith("; the gates are in gates.safetensors")
    assert wrote == f"{target}: a stock mixtral checkpoint"
    agreement = json.loads((target / "import.json").read_text())["fit"]["mean"]["agreement"]
    assert f"{agreement:.1%}" in fitted


def test_with_a_corpus_the_routers_are_fitted_on_its_windows_and_another_tokenizer_is_refused(
    corpus: Path, byte_level: Path
) -> None:
    source = checkpoint(Path("source").resolve(), byte_level)
    arguments = ["--corpus", "data/corpora/tiny", "--windows", "10"]
    result = CliRunner().invoke(cli.app, ["import", str(source), "new", *arguments])
    assert result.exit_code == 0, result.output
    assert "fitted on 640 tokens of data/corpora/tiny: they make" in result.output
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = CliRunner().invoke(cli.app, ["import", str(source), "other", *arguments])
    assert result.exit_code == 1
    assert "was tokenised with" in result.stderr
    assert not Path("other").exists()


def test_what_cannot_be_imported_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", add_weight_norm=True)
    scale = checkpoint(tmp_path / "scale", score_scale_factor=float("nan"))
    doubled = checkpoint(tmp_path / "doubled")
    save_file({"model.norm.weight": torch.zeros(HIDDEN)}, doubled / "more.safetensors")
    weights = checkpoint(tmp_path / "weights")
    tensors = load_file(weights / "model.safetensors")
    tensors["lm_head.weight"][2, 3] = float("nan")
    save_file(tensors, weights / "model.safetensors")
    for arguments, message in (
        ([str(scale), str(tmp_path / "new")], "config.json: score_scale_factor = nan; needed: a finite number"),
        ([str(doubled), str(tmp_path / "new")], "model.norm.weight twice, in model.safetensors and more.safetensors"),
        ([str(weights), str(tmp_path / "new")], "model.safetensors: lm_head.weight holds nan at [2, 3]"),
        ([str(source), str(tmp_path / "new")], "add_weight_norm = True is not imported, only False"),
        ([str(source), str(tmp_path)], "is there already"),
        ([str(tmp_path / "none"), str(tmp_path / "new")], "config.json: not found"),
    ):
        result = CliRunner().invoke(cli.app, ["import", *arguments])
        assert result.exit_code == 1
        assert result.stderr.startswith("moeforge: ")
        assert message in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"source", "scale", "doubled", "weights"}


def test_an_import_that_is_killed_leaves_no_half_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = checkpoint(tmp_path / "source"), tmp_path / "new"
    arguments = ["import", str(source), str(target)]
    with monkeypatch.context() as patch:
        patch.setattr(gate, "write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        if not (pid := os.fork()):
            CliRunner().invoke(cli.app, arguments)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not target.exists()
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
