"""`moeforge export`: the file and the command lines of each engine, or why it cannot run the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from typer.testing import CliRunner, Result

from flows import cli, export
from tasks.moe import files
from tests import models

FIELDS: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    settings = (Path(__file__).parent.parent.parent / "pipelines.yaml").read_text()
    (tmp_path / "pipelines.yaml").write_text(settings)
    return tmp_path


def save(folder: Path, tokenizer: Path, kind: str = "mixtral", **fields: Any) -> Path:
    folder.mkdir(parents=True)
    files.save(models.build(kind, **FIELDS | fields), folder)
    files.copy_tokenizer(tokenizer, folder)
    return folder


def exported(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["export", *arguments])


def test_a_pipelines_result_is_written_beside_it_with_a_line_for_every_engine(project: Path, tiny_model: Path) -> None:
    save(Path("runs/demo/trained"), tiny_model)
    said = exported("demo", "--gguf", "--quantise", "Q8_0")
    assert said.exit_code == 0, said.output
    file = Path("runs/demo/export/demo-Q8_0.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q8_0"
    assert file.with_suffix(".Modelfile").read_text().startswith("FROM ./demo-Q8_0.gguf\n")
    assert said.stdout.splitlines()[1:] == [
        f"llama.cpp: llama-cli -m {file} -c 64",
        "Ollama: ollama create demo -f runs/demo/export/demo-Q8_0.Modelfile && ollama run demo",
        "vLLM: vllm serve runs/demo/trained",
        "SGLang: python -m sglang.launch_server --model-path runs/demo/trained",
    ]
    assert {path.name for path in file.parent.iterdir()} == {"demo-Q8_0.gguf", "demo-Q8_0.Modelfile"}
    save(Path("runs/demo/model"), tiny_model)  # with the card: it goes first
    assert export.checkpoint("demo") == (Path("runs/demo/model"), "demo")


def test_the_dense_child_is_written_beside_the_result_and_not_into_a_folder_that_dvc_watches(
    project: Path, tiny_model: Path
) -> None:
    said = exported("demo", "--child", "--gguf")
    assert said.exit_code == 1
    assert "runs/demo/control/model: not there yet; run `moeforge run demo` first" in said.stderr
    assert "has no pruned baseline; set control: pruned" in exported("fine", "--child").stderr
    assert "pipelines has no 'runs/demo/control/model'" in exported("runs/demo/control/model", "--child").stderr
    save(Path("runs/demo/control/model"), tiny_model, "llama")
    said = exported("demo", "--child", "--gguf")
    assert "llama.cpp: llama-cli -m runs/demo/export/demo-child-F16.gguf -c 64" in said.stdout
    assert "vLLM: vllm serve runs/demo/control/model" in said.stdout
    said = exported("runs/demo/control/model", "--gguf", "--quantise", "F32")
    assert said.exit_code == 0, said.output
    found = {path.name for path in Path("runs/demo/export").glob("*.gguf")}
    assert found == {"demo-child-F16.gguf", "model-F32.gguf"}
    assert [path.name for path in Path("runs/demo/control").iterdir()] == ["model"]


def test_without_gguf_it_says_how_or_why_not_and_writes_nothing(project: Path, tiny_model: Path) -> None:
    folder = save(project / "some/model", tiny_model, "granitemoe", attention_bias=True, rope_parameters=models.LLAMA3)
    said = exported(str(folder)).stdout.splitlines()
    assert said[0] == "llama.cpp, Ollama: add --gguf, which writes their file"
    assert said[1].startswith("vLLM: no: it computes no bias on the attention's q, k, v, o in a granitemoe")
    assert said[2].startswith("SGLang: no: rope scaling 'llama3' is not carried")
    window = save(project / "windows", tiny_model, sliding_window=8)
    assert "SGLang: python -m sglang.launch_server --model-path" in exported(str(window)).stdout
    assert exported(str(window)).stdout.rstrip().endswith(f"{window} --context-length 8")
    assert sorted(path.name for path in project.iterdir()) == ["pipelines.yaml", "some", "windows"]


def test_what_cannot_be_exported_is_one_message(project: Path, tiny_model: Path) -> None:
    refused = save(project / "refused", tiny_model, "qwen3_moe", norm_topk_prob=False)
    for arguments, message in (
        (["demo", "--gguf"], "runs/demo/model: not there yet; run `moeforge run demo` first"),
        (["nothing"], "nothing"),
        ([str(project)], "no checkpoint here (config.json is missing)"),
        ([str(refused), "--gguf"], "llama.cpp cannot run it: norm_topk_prob is false"),
        ([str(refused), "--quantise", "Q8_0"], "--quantise goes with --gguf"),
        ([str(refused), "--output", "x.gguf"], "--output goes with --gguf"),
    ):
        said = exported(*arguments)
        assert said.exit_code == 1, said.output
        assert said.stderr.startswith("moeforge: ")
        assert message in said.stderr
        assert "unexpected" not in said.stderr
    assert not list(project.rglob("*gguf*"))


def test_output_names_the_file(project: Path, tiny_model: Path) -> None:
    folder = save(project / "model", tiny_model)
    said = exported(str(folder), "--gguf", "--output", "out/mine.gguf")
    assert said.exit_code == 0, said.output
    assert {path.name for path in Path("out").iterdir()} == {"mine.gguf", "mine.Modelfile"}
    assert "llama.cpp: llama-cli -m out/mine.gguf -c 64" in said.stdout
