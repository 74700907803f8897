"""What inference engines can run of a model: limits by engine and class, with the version that they were read from.

llama.cpp: read in b11549 (October 2026), and run (tests/engines/test_gguf_file.py). The number of chosen experts is
limited because its graph has a budget of nodes, and two of them are spent on each chosen expert of each layer
(`graph_max_nodes` in llama-context.cpp, `build_moe_ffn` in llama-graph.cpp).
"""

from __future__ import annotations

from typing import Any

from tasks import architectures

_LLAMA_CPP_EXPERTS = 1024
"""LLAMA_MAX_EXPERTS in llama-hparams.h."""
_ATTENTION_AND_ROUTER = 43
"""Nodes of a sparse layer, but for those of single chosen experts, biases, norms of queries and keys, shared experts
and a residual multiplier: 2 a chosen expert, 1 a bias, 4, 5 and 2."""
_HASH_SIZES = (1031, 2053, 4099, 8209, 16411, 32771)
"""ggml's tables of nodes and leaves (`ggml_hash_size`): the smallest that is not below the budget of nodes."""
_INPUTS = 9


def llama_cpp(config: Any) -> str:
    """Why llama.cpp cannot compute what a model does, by its config; empty if it can."""
    row = architectures.row(config)
    if row.llama_cpp is None:
        return f"no GGUF file is written of {row.model_type}"
    biases, kind = architectures.biases(config), config.rope_parameters["rope_type"]
    carried = ["default", "linear", "yarn", *["llama3"] * row.llama_cpp.of_llama]
    if kind not in carried:
        return f"rope scaling {kind!r} is not carried; {row.llama_cpp.name} has {', '.join(carried)}"
    if config.hidden_act != "silu":
        return f"hidden_act = {config.hidden_act!r}; it computes SwiGLU alone"
    if biases == "qkvo" and not row.llama_cpp.output_bias:
        return f"{row.llama_cpp.name} has no bias on the attention's output"
    if not isinstance(row, architectures.Sparse):
        return ""
    if dense := config.num_hidden_layers - len(architectures.sparse_layers(config)):
        return f"{dense} of {config.num_hidden_layers} layers are dense; make all sparse (partition.layers: all)"
    if not getattr(config, "norm_topk_prob", True):
        return "norm_topk_prob is false; it normalises the chosen experts' weights"
    if (experts := getattr(config, row.experts)) > _LLAMA_CPP_EXPERTS:
        return f"{experts} experts; at most {_LLAMA_CPP_EXPERTS}"
    if config.num_experts_per_tok > (most := llama_cpp_top_k(config)):
        return (
            f"{config.num_experts_per_tok} chosen experts in {config.num_hidden_layers} layers; at most {most}: take "
            "fewer and wider ones"
        )
    return ""


def llama_cpp_top_k(config: Any) -> int:
    """The largest number of chosen experts for which llama.cpp's graph of a sparse model fits its budget."""
    row, layers = architectures.row(config), config.num_hidden_layers
    assert isinstance(row, architectures.Sparse)
    biases = len(architectures.biases(config))
    shared = bool(row.shared_size and getattr(config, row.shared_size))
    scaled = architectures.multipliers(config)["residual_multiplier"] != 1
    weights = layers * (10 + biases + 2 * row.qk_norm + 3 * shared) + 2 + (not config.tie_word_embeddings)
    fixed = _ATTENTION_AND_ROUTER + biases + 4 * row.qk_norm + 5 * shared + 2 * scaled
    outside = 11  # embedding, final norm, head, and granite's scales of embedding and logits
    budget = max(1024, 8 * weights)
    table = next(size for size in (*_HASH_SIZES, 2 * budget) if size >= budget)
    room = min(budget, table - weights - 2 * layers - _INPUTS) - outside
    return int((room // layers - fixed) // 2)
