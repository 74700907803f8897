"""A model whose weights are not normalised, as a GGUF file: llama.cpp's override serves every top_k."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from tasks.engines import gguf, limits, llama_cpp, overrides
from tasks.moe import files

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3,
    "norm_topk_prob": False, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_model):
    """A folder with a checkpoint and its GGUF file; logits far from flat, the shared gate zero, biases that count."""
    folder = tmp_path_factory.mktemp("elastic")
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(Qwen2MoeConfig(**SIZES, shared_expert_intermediate_size=64)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1, 0.1) if "norm" in name else parameter.normal_(0, 0.15)
            if "down_proj" in name and "shared" not in name:
                parameter.mul_(8)  # the experts, folded into it
            if "shared_expert_gate" in name:
                parameter.zero_()
    (folder / "model").mkdir()
    files.save(made, folder / "model")
    files.copy_tokenizer(tiny_model, folder / "model")
    assert gguf.export(folder / "model", folder / "model.gguf", kind="F32")["architecture"] == "deepseek"
    return folder


@pytest.mark.parametrize("top_k", [None, 1, 5, 8])
def test_an_override_of_top_k_gives_what_transformers_gives_at_that_top_k(model, top_k):
    ids = np.random.default_rng(0).integers(1, 512, (2, 96))
    given = np.load(llama_cpp.ask(model / "model.gguf", ids=ids.tolist(), top_k=top_k)["logits"])
    options = {} if top_k is None else {"num_experts_per_tok": top_k}
    loaded = AutoModelForCausalLM.from_pretrained(model / "model", experts_implementation="eager", **options).eval()
    with torch.no_grad():
        expected = loaded(torch.from_numpy(ids)).logits.numpy()
    assert np.quantile(np.abs(given - expected).max(-1) / expected.std(), 0.95) < 0.01
    assert (given.argmax(-1) == expected.argmax(-1)).mean() > 0.97


def test_llama_cpp_wants_whole_shared_experts_and_the_usual_head_dim():
    for fields, reason in (
        ({"shared_expert_intermediate_size": 8}, "8 neurons are shared"),
        ({"shared_expert_intermediate_size": 48}, "shared experts of 32 neurons each"),
        ({"shared_expert_intermediate_size": 32, "head_dim": 24}, "head_dim = 24"),
    ):
        assert reason in limits.check("llama.cpp", Qwen2MoeConfig(**SIZES, **fields))
        assert "norm_topk_prob" not in limits.check("vllm", Qwen2MoeConfig(**SIZES, **fields))
    assert limits.check("llama.cpp", Qwen2MoeConfig(**SIZES, shared_expert_intermediate_size=32)) == ""


def test_the_override_of_each_engine_is_named_for_an_elastic_model_alone():
    assert overrides.by_engine(Qwen2MoeConfig(**SIZES)) == {}
    assert overrides.by_engine(Qwen2MoeConfig(**SIZES, elastic_top_k=[3, 8])) == {
        "llama.cpp": "--override-kv deepseek.expert_used_count=int:K",
        "vLLM": "--hf-overrides '{\"num_experts_per_tok\": K}'",
        "SGLang": "--json-model-override-args '{\"num_experts_per_tok\": K}'",
        "transformers": "from_pretrained(..., num_experts_per_tok=K)",
    }
