"""The split of each dense family, as a GGUF file in a stock llama.cpp, computes what its parent does in transformers.

With all experts on and equally weighted the sum of the experts is the dense FFN (the identity test), in every shape.
"""

import numpy as np
import pytest
import torch

from tasks import settings
from tasks.engines import gguf, llama_cpp
from tasks.moe import files
from tasks.partition import shapes
from tasks.partition.convert import ffn, slices
from tests import models
from tests.partition import dense_models

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "max_position_embeddings": 128}
SPLITS = {
    "llama": {"experts": 6},
    "llama, shared": {"experts": 4, "shared_experts": 2},
    "llama, tied, many": {"experts": 24},
    "llama, biases": {"experts": 6, "engines": ["llama.cpp", "transformers"]},
    "mistral, wide heads": {"experts": 3},
    "mistral, shared": {"experts": 2, "shared_experts": 1},
    "qwen2": {"experts": 6},
    "qwen2, shared": {"experts": 4, "shared_experts": 2, "engines": ["llama.cpp", "transformers"]},
    "qwen3": {"experts": 6},
    "granite": {"experts": 4, "shared_experts": 2},
}
FIELDS = {
    "llama, tied, many": {"tie_word_embeddings": True, "rope_parameters": models.LLAMA3},
    "llama, biases": {"attention_bias": True},
    "mistral, wide heads": {"head_dim": 32, "sliding_window": None},
    "mistral, shared": {"sliding_window": None},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "granite": models.GRANITE,
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_split_of_every_family_has_its_parents_perplexity_in_llama_cpp(tmp_path, tiny_model, name):
    dense = models.build(name, **SIZES | FIELDS.get(name, {}))
    parent = dense_models.stored(tmp_path / "dense", dense)
    method = "activation" if "shared_experts" in SPLITS[name] else "random"
    options = settings.Partition(method=method, **SPLITS[name], top_k=SPLITS[name]["experts"])
    shapes.require(parent.config, options)  # by default vLLM and transformers load it too
    total = options.experts + options.shared_experts
    index = np.random.default_rng(0).permutation(192).reshape(total, -1)

    def layer(i):
        return slices(*ffn(parent, i), index, shared=options.shared_experts, scale=options.experts)

    dense_models.export(parent, tmp_path / "moe", options, layer=layer)
    files.copy_tokenizer(tiny_model, tmp_path / "moe")
    gguf.export(tmp_path / "moe", tmp_path / "moe.gguf", kind="F32")

    ids = np.random.default_rng(1).integers(1, 512, (2, 96))
    answer = llama_cpp.ask(tmp_path / "moe.gguf", ids=ids.tolist())
    with torch.no_grad():
        expected = dense(torch.from_numpy(ids)).logits
    theirs = torch.from_numpy(np.load(answer["logits"]))
    assert (theirs - expected).abs().max() < 0.02 * expected.std()  # its KV cache is fp16
    of_theirs, of_ours = (
        torch.nn.functional.cross_entropy(logits[:, :-1].mT, torch.from_numpy(ids[:, 1:])).exp().item()
        for logits in (theirs, expected)
    )
    assert of_theirs == pytest.approx(of_ours, rel=0.005)
