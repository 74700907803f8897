"""Speed in a stock llama.cpp, beside files that it refuses or at which it ends its process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.engines import gguf, limits, llama_cpp, turns


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    target = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf.export(tiny_model, target, kind="Q8_0")
    return target


def too_many_chosen(folder: Path, *, tokenizer: Path) -> Path:
    """A file that llama.cpp loads, and whose graph it has no room for."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from tasks.moe import files

    sizes = {"num_hidden_layers": 30, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    experts = {"intermediate_size": 8, "num_local_experts": 32, "num_experts_per_tok": 24}
    folder.mkdir()
    files.save(MixtralForCausalLM(MixtralConfig(vocab_size=512, hidden_size=32, **sizes, **experts)), folder)
    files.copy_tokenizer(tokenizer, folder)
    gguf.export(folder, folder / "file.gguf")
    return folder / "file.gguf"


def test_files_that_run_are_rated_and_each_of_the_others_has_llama_cpps_last_words(
    file: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "llama_cpp", lambda config: "")
    aborts = too_many_chosen(tmp_path / "model", tokenizer=tiny_model)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:4000])
    text = turns.Text(list(range(1, 97)), new=3, repeats=2)
    files = {"first": file, "aborts": aborts, "cut": tmp_path / "cut.gguf", "last": file}
    rates, refused = llama_cpp.measure(files, text, threads=1)
    assert list(rates) == ["first", "last"]
    for rate in rates.values():
        assert {what: len(values) for what, values in rate.items()} == {"prompt": 2, "decode": 2}
        assert min(*rate["prompt"], *rate["decode"]) > 0
    assert "GGML_ASSERT" in refused["aborts"]
    assert "llama.cpp does not load" in refused["cut"]


def test_one_token_after_the_other_gives_the_text_that_the_whole_prompt_gives(file: Path) -> None:
    ids = list(range(1, 31))
    (first, second, third) = llama_cpp.ask(file, ids=[ids], generate=3)["generated"]
    assert llama_cpp.ask(file, ids=[[*ids, first]], generate=2)["generated"] == [second, third]
