"""Exported GGUF files in a stock llama.cpp: every class, rope kind and tokenizer layout; what is refused, and why."""

import json

import gguf
import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tasks.engines import gguf as exporter
from tasks.engines import llama_cpp
from tasks.moe import files
from tests.conftest import documents
from tests.corpus.tokenizer import vocabularies

_COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_EXPERTS = {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 3}
_QWEN = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
_CONFIGS = {
    "llama with biases": LlamaConfig(**_COMMON, attention_bias=True),
    "llama 3.1": LlamaConfig(**_COMMON, rope_parameters={**_SCALED, **_LLAMA3}),
    "llama, linear rope": LlamaConfig(**_COMMON, rope_parameters={"rope_type": "linear", **_SCALED}),
    "llama, yarn": LlamaConfig(**_COMMON, rope_parameters={"rope_type": "yarn", **_SCALED}),
    "llama, yarn with its own attention factor": LlamaConfig(
        **_COMMON, rope_parameters={"rope_type": "yarn", **_SCALED, "mscale": 0.5, "mscale_all_dim": 1.0}
    ),
    "mistral, wide heads": MistralConfig(**_COMMON, head_dim=32, sliding_window=None),
    "qwen2, tied": Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_COMMON, head_dim=32),
    "granite": GraniteConfig(**_COMMON, **_MULTIPLIERS, logits_scaling=2.0, attention_bias=True),
    "mixtral": MixtralConfig(**_COMMON, **_EXPERTS, sliding_window=None),
    "mixtral, tied": MixtralConfig(**_COMMON, **_EXPERTS, sliding_window=None, tie_word_embeddings=True),
    "granitemoe with biases": GraniteMoeConfig(**_COMMON, **_EXPERTS, attention_multiplier=0.25, attention_bias=True),
    "granitemoeshared, tied": GraniteMoeSharedConfig(
        **_COMMON, **_EXPERTS, shared_intermediate_size=64, attention_multiplier=0.25, tie_word_embeddings=True
    ),
    "granitemoeshared, odd heads": GraniteMoeSharedConfig(
        **_COMMON, **_EXPERTS, shared_intermediate_size=64, attention_multiplier=0.14, head_dim=48
    ),
    "qwen2_moe, gate at zero": Qwen2MoeConfig(**_COMMON, **_QWEN, shared_expert_intermediate_size=64),
    "qwen2_moe, none shared, tied": Qwen2MoeConfig(
        **_COMMON, **_QWEN, shared_expert_intermediate_size=8, tie_word_embeddings=True
    ),
    "qwen3_moe, tied": Qwen3MoeConfig(**_COMMON, **_QWEN, head_dim=32, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**_COMMON, **_QWEN, head_dim=32),
}


def _save(config, folder, *, tokenizer, seed=0):
    """A random model whose logits are far from flat; a shared gate is zero, as conversion leaves it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1, 0.1) if "norm" in name else parameter.normal_(0, 0.15)
            if "shared_expert_gate" in name:
                parameter.zero_()
    folder.mkdir()
    files.save(model, folder)
    files.copy_tokenizer(tokenizer, folder)
    return model


@pytest.mark.parametrize("name", _CONFIGS)
def test_llama_cpp_computes_the_logits_and_the_greedy_text_of_transformers(tmp_path, tiny_model, name):
    model = _save(_CONFIGS[name], tmp_path / "model", tokenizer=tiny_model)
    exporter.export(tmp_path / "model", tmp_path / "model.gguf", kind="F32")

    ids = np.random.default_rng(0).integers(1, 512, (2, 96))
    answer = llama_cpp.ask(tmp_path / "model.gguf", ids=ids.tolist(), generate=8)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
        text = model.generate(torch.from_numpy(ids[:1]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    difference = np.abs(np.load(answer["logits"]) - expected).max(-1) / expected.std()
    # its KV cache is fp16; a near-tie between two experts may fall otherwise in single positions
    assert np.quantile(difference, 0.95) < 0.01
    assert (np.load(answer["logits"]).argmax(-1) == expected.argmax(-1)).mean() > 0.97
    assert answer["generated"][:4] == text[0, 96:100].tolist()
    of_theirs, of_ours = (_perplexity(logits, ids) for logits in (np.load(answer["logits"]), expected))
    assert of_theirs == pytest.approx(of_ours, rel=0.005)


def _perplexity(logits, ids):
    log_likelihood = torch.from_numpy(logits[:, :-1]).double().log_softmax(-1)
    return (-log_likelihood.gather(-1, torch.from_numpy(ids[:, 1:, None]))).mean().exp().item()


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, tiny_model):
    """Folders with the tokenizer of each layout, trained on a little text."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text").write_text("\n".join(documents("prose")[:200]))
    SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "sp"), vocab_size=600, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    tokenizer = vocabularies.llama2(SentencePieceProcessor(model_file=str(folder / "sp.model")))
    raw = json.loads((tiny_model / "tokenizer.json").read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": vocabularies.LLAMA3_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    unsplit = raw["pre_tokenizer"] | {"use_regex": False}
    llama3 = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, unsplit]}}
    llama3["model"] = raw["model"] | {"ignore_merges": True}
    end = {"eos": "<|endoftext|>", "bos": "<|endoftext|>"}
    return {
        "gpt-2": tiny_model,
        "llama-2": vocabularies.save(tokenizer, folder / "llama-2", eos="</s>", bos="<s>"),
        "smollm": vocabularies.save(vocabularies.smollm2(raw), folder / "smollm", **end),
        "llama-3": vocabularies.save(Tokenizer.from_str(json.dumps(raw | llama3)), folder / "llama-3", **end),
    }


_TEXTS = [
    "The quick brown fox jumps over 13 lazy dogs, and 2048 more.",
    "  leading spaces,\ttabs\nand\r\n\r\nlines   with   runs of them  ",
    "naïve café, Ελληνικά, 日本語, 🙂 and \u200d\u0000 too",
    "def f(x):\n    return {'a': x**2, \"b\": [1.5e-3]}\n",
    "it's what we'll do: they'RE",
    "<|endoftext|> and </s> stand here as text",
]


@pytest.mark.parametrize("layout", ["gpt-2", "llama-2", "smollm", "llama-3"])
def test_llama_cpp_tokenises_as_the_checkpoints_tokenizer_does(tmp_path, layouts, layout):
    folder = layouts[layout]
    size = len(AutoTokenizer.from_pretrained(folder))
    _save(LlamaConfig(**_COMMON | {"vocab_size": size + 3}), tmp_path / "model", tokenizer=folder)
    exporter.export(tmp_path / "model", tmp_path / "model.gguf")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer = llama_cpp.ask(tmp_path / "model.gguf", texts=_TEXTS)
    assert answer["tokens"] == [tokenizer(text, split_special_tokens=True).input_ids for text in _TEXTS]


def test_the_command_stores_matrices_in_blocks_of_32_in_q8_0_and_the_rest_as_it_was(
    tmp_path, tiny_model, monkeypatch, capsys
):
    config = MixtralConfig(**_COMMON, **_EXPERTS | {"intermediate_size": 24}, sliding_window=None)
    _save(config, tmp_path / "model", tokenizer=tiny_model)
    command = ["gguf", str(tmp_path / "model"), str(tmp_path / "model.gguf"), "--quantise", "Q8_0"]
    monkeypatch.setattr("sys.argv", command)
    assert exporter.main() == 0

    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_up_exps.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16"  # rows of 24
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"
    assert "model.gguf: llama, " in capsys.readouterr().out
    assert (tmp_path / "model.Modelfile").read_text().startswith("FROM ./model.gguf\nPARAMETER num_ctx 256\n")
    llama_cpp.ask(tmp_path / "model.gguf", ids=[[1, 2, 3]])


def test_the_largest_top_k_runs_and_one_more_is_refused(tmp_path, tiny_model):
    config = MixtralConfig(
        **_COMMON | {"num_hidden_layers": 30, "hidden_size": 32},
        **_EXPERTS | {"intermediate_size": 8, "num_local_experts": 32, "num_experts_per_tok": 18},
        sliding_window=None,
    )
    _save(config, tmp_path / "model", tokenizer=tiny_model)
    exporter.export(tmp_path / "model", tmp_path / "model.gguf")
    llama_cpp.ask(tmp_path / "model.gguf", ids=[list(range(1, 97))], generate=1)

    config.num_experts_per_tok = 19
    files.write_config(config, tmp_path / "model")
    with pytest.raises(ValueError, match=r"19 chosen experts .* at most 18"):
        exporter.export(tmp_path / "model", tmp_path / "refused.gguf")
    assert not (tmp_path / "refused.gguf").exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen2MoeConfig(**_COMMON, **_QWEN, mlp_only_layers=[0]), "1 of 2 layers are dense"),
        (Qwen3MoeConfig(**_COMMON, **_QWEN | {"norm_topk_prob": False}), "norm_topk_prob is false"),
        (Qwen3Config(**_COMMON, attention_bias=True), "no bias on the attention's o in a qwen3"),
        (Qwen2Config(**_COMMON, rope_parameters={**_SCALED, **_LLAMA3}), "rope scaling 'llama3'"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_with_the_reason(tmp_path, tiny_model, config, reason):
    _save(config, tmp_path / "model", tokenizer=tiny_model)
    with pytest.raises(ValueError, match=reason):
        exporter.export(tmp_path / "model", tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_gate_that_training_has_moved_and_a_missing_head_are_refused_and_nothing_is_left(tmp_path, tiny_model):
    config = Qwen2MoeConfig(**_COMMON, **_QWEN, shared_expert_intermediate_size=64)
    model = _save(config, tmp_path / "model", tokenizer=tiny_model)
    model.model.layers[1].mlp.shared_expert_gate.weight.data[0, 5] = 0.01
    files.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match="gate is not zero any more"):
        exporter.export(tmp_path / "model", tmp_path / "model.gguf")
    config.tie_word_embeddings = True
    files.write_config(config, tmp_path / "model")
    with pytest.raises(ValueError, match=r"1 unknown \(lm_head.weight\)"):
        exporter.export(tmp_path / "model", tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
