"""Speed in the real engines: what is named, what is compared, and models that an engine does not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.engines import llama_cpp, turns
from tasks.evaluate.speeds import speed

TEXT = turns.Text(list(range(1, 41)), new=2, repeats=2)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Experts of 6 neurons, which grouped_mm refuses, and more chosen ones than llama.cpp has room for."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from tasks.moe import files

    sizes = {"num_hidden_layers": 30, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    experts = {"intermediate_size": 6, "num_local_experts": 32, "num_experts_per_tok": 24}
    folder = tmp_path_factory.mktemp("narrow")
    files.save(MixtralForCausalLM(MixtralConfig(vocab_size=512, hidden_size=32, **sizes, **experts)), folder)
    files.copy_tokenizer(tiny_model, folder)
    return folder


def test_a_dense_model_stands_in_both_rows_and_the_implementation_that_ran_is_named(
    tiny_model: Path, narrow: Path, tmp_path: Path
) -> None:
    folders = {"dense": tiny_model, "trained": narrow}
    rows = speed.in_transformers(folders, TEXT, dtypes=["float32"], threads=[1])
    assert [row["engine"] for row in rows] == ["transformers", "moe_kernels"]
    stock, ours = (row["models"] for row in rows)
    assert stock["dense"] == ours["dense"]
    assert (stock["trained"]["experts"], ours["trained"]["experts"]) == ("eager", "moe_kernels")
    for models in (stock, ours):
        for what in ("prompt", "decode"):
            quotient = models["trained"]["ratio"][what]
            assert quotient["min"] <= quotient["median"] <= quotient["max"]
            assert models["trained"]["repeats"] == 2
        assert min(model["memory"] for model in models.values()) > 50 << 20  # with torch


def test_a_process_that_fails_leaves_its_last_words_in_every_row(tiny_model: Path, tmp_path: Path) -> None:
    folders = {"dense": tiny_model, "trained": tmp_path}
    rows = speed.in_transformers(folders, TEXT, dtypes=["float32"], threads=[1])
    assert [row["engine"] for row in rows] == ["transformers", "moe_kernels"]
    for row in rows:
        assert all("config.json" in model["reason"] for model in row["models"].values())


def test_what_llama_cpp_does_not_run_has_a_reason_and_its_files_are_removed(
    tiny_model: Path, narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"dense": tiny_model, "trained": narrow}
    (row,) = speed.in_llama_cpp(folders, TEXT, threads=[1], scratch=tmp_path)
    assert row["models"]["trained"] == {
        "reason": "24 chosen experts in 30 layers; at most 18: take fewer and wider ones"
    }
    assert row["models"]["dense"]["decode"]["median"] > 0
    assert row["models"]["dense"]["memory"] > 10 << 20
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    (row,) = speed.in_llama_cpp(folders, TEXT, threads=[1], scratch=tmp_path)
    assert all("pip install 'moeforge[llama-cpp]'" in model["reason"] for model in row["models"].values())


def test_ratios_are_of_the_same_repeat_and_not_of_the_medians() -> None:
    ours = {"prompt": [10.0, 40.0, 90.0], "decode": [1.0, 1.0, 1.0]}
    parent = {"prompt": [10.0, 20.0, 30.0], "decode": [2.0, 2.0, 4.0]}
    figures = speed.figures(ours, parent, text=TEXT)
    assert figures["prompt"] == {"median": 40, "min": 10, "max": 90}
    assert figures["ratio"]["prompt"] == {"median": 2, "min": 1, "max": 3}
    assert figures["ratio"]["decode"] == {"median": 0.5, "min": 0.25, "max": 0.5}
    assert figures["first_token"] == 1.0
    assert "ratio" not in speed.figures(ours, None, text=TEXT)
