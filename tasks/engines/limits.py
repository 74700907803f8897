"""What each engine cannot load or compute of a model, by its config, and what it runs slowly. The table is table.py.

    limits.check("llama.cpp", config)       # why it cannot, with the field to change; "" if it can
    limits.slow("llama.cpp", config)        # why it will be slow, with a figure; "" if not
    limits.context("llama.cpp", config)     # tokens up to which it computes what transformers 5 does

The number of chosen experts is limited in llama.cpp because its graph has a budget of nodes, and two of them are spent
on each chosen expert of each layer (`graph_max_nodes` in llama-context.cpp, `build_moe_ffn` in llama-graph.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks import architectures
from tasks.engines.table import ENGINES, LLAMA_CPP, ROPES, Row, Support
from tasks.settings.partition import Engine

_ATTENTION_AND_ROUTER = 43
"""Nodes of a sparse layer, but for those of single chosen experts, biases, norms of queries and keys, shared experts
and a residual multiplier: 2 a chosen expert, 1 a bias, 4, 5 and 2."""
_HASH_SIZES = (1031, 2053, 4099, 8209, 16411, 32771)
"""ggml's tables of nodes and leaves (`ggml_hash_size`): the smallest that is not below the budget of nodes."""
_INPUTS = 9


def check(engine: Engine, config: Any) -> str:
    """Why an engine cannot load a model or computes another one, with the field to change; empty if it can."""
    return next(_reasons(ENGINES[engine], config, trained=True), "")


def llama_cpp(config: Any) -> str:
    """Why no GGUF file can say what a model computes, whose shared gates are still zero; empty if one can."""
    return next(_reasons(LLAMA_CPP, config, trained=False), "")


def slow(engine: Engine, config: Any) -> str:
    """Why an engine runs a sparse model slowly, with figures; empty if it does not, or if the model is dense."""
    row, known = ENGINES[engine], architectures.row(config)
    if not isinstance(known, architectures.Sparse):
        return ""
    width, chosen = getattr(config, known.expert_size), config.num_experts_per_tok
    why = []
    if width < row.narrow:
        why.append(f"experts of {width} neurons are narrow: {row.narrow_why}")
    if width % row.blocks:
        why.append(f"{width} neurons are no multiple of {row.blocks}: {row.blocks_why}")
    if row.chosen and chosen > row.chosen:
        why.append(f"{chosen} chosen experts are more than {row.chosen}: {row.chosen_why}")
    return "; ".join(why)


def context(engine: Engine, config: Any) -> int:
    """Tokens up to which an engine computes what transformers 5 does: its sliding windows may be others."""
    support = ENGINES[engine].classes.get(config.model_type)
    windows, longest = architectures.windows(config), int(config.max_position_embeddings)
    held = {"none": windows == [None] * len(windows), "uniform": len(set(windows)) == 1, "per layer": True}
    if support is None or held[support.window]:
        return longest
    return min(longest, *filter(None, windows))


def _reasons(row: Row, config: Any, *, trained: bool) -> Iterator[str]:
    known = architectures.row(config)
    if support := row.classes.get(known.model_type):
        yield from _of_any_class(row, support, config)
        if isinstance(known, architectures.Sparse):
            yield from _of_experts(row, support, known, config=config, trained=trained)


def _of_any_class(row: Row, support: Support, config: Any) -> Iterator[str]:
    known, biases = architectures.row(config), architectures.biases(config)
    kind = config.rope_parameters["rope_type"]
    if kind not in support.ropes:
        has = ", ".join(name for name in ROPES if name in support.ropes)
        yield f"rope scaling {kind!r} is not carried; a {known.model_type} has {has} there"
    for field, fixed in row.yarn_fixed.items() if kind == "yarn" else ():
        if (value := config.rope_parameters.get(field)) is not None and value != fixed:
            yield f"rope_parameters.{field} = {value}; of rope scaling 'yarn' it has {fixed or 'none'} there"
    if config.hidden_act != "silu":
        yield f"hidden_act = {config.hidden_act!r}; it computes SwiGLU alone"
    if dropped := set(biases) - set(support.biases):
        named = ", ".join(name for name in "qkvo" if name in dropped)
        yield f"it computes no bias on the attention's {named} in a {known.model_type}, and says nothing of it"
    if support.wants_biases and not biases:
        yield f"it leaves the biases of q, k and v uninitialised, which this {known.model_type} lacks; partition again"
    usual = config.hidden_size // config.num_attention_heads
    if not support.head_dim and (size := architectures.head_dim(config)) != usual:
        yield f"head_dim = {size}; it takes hidden / heads = {usual} in a {known.model_type}"
    if not support.tied and config.tie_word_embeddings:
        yield f"tie_word_embeddings: it leaves the head of a {known.model_type} uninitialised"


def _of_experts(
    row: Row, support: Support, known: architectures.Sparse, *, config: Any, trained: bool
) -> Iterator[str]:
    layers = config.num_hidden_layers
    if not support.dense_layers and (dense := layers - len(architectures.sparse_layers(config))):
        yield f"{dense} of {layers} layers are dense; make all sparse (partition.layers: all)"
    shared = getattr(config, known.shared_size) if known.shared_size else 0
    normalises = architectures.normalises(config)
    if not normalises:
        yield from _of_unnormalised(support, config, shared=shared, width=getattr(config, known.expert_size))
    if trained and normalises and known.shared_gate and shared > architectures.IDLE and not support.trained_gate:
        yield (
            f"it computes the gate before a {known.model_type}'s shared experts wrongly, and training moves it; leave "
            "them out (partition.shared_experts: 0)"
        )
    if row.experts and (experts := getattr(config, known.experts)) > row.experts:
        yield f"{experts} experts; at most {row.experts}"
    if row.top_k and config.num_experts_per_tok > (most := llama_cpp_top_k(config)):
        chosen = config.num_experts_per_tok
        yield f"{chosen} chosen experts in {layers} layers; at most {most}: take fewer and wider ones"
    width, size = getattr(config, known.expert_size), _bytes(config)
    if width * size % row.row_bytes:
        yield (
            f"experts of {width} neurons have rows of {width * size} bytes, and grouped_mm, its default, "
            f"takes multiples of {row.row_bytes}: take a multiple of {row.row_bytes // size} neurons"
        )


def _of_unnormalised(support: Support, config: Any, *, shared: int, width: int) -> Iterator[str]:
    if not support.unnormalised:
        yield "norm_topk_prob is false; it normalises the chosen experts' weights"
    if not support.whole_shared:
        return
    if not shared or shared % width:
        yield (
            f"norm_topk_prob is false and {shared} neurons are shared; without normalisation it takes shared experts "
            f"of {width} neurons each: set partition.shared_experts to 1 or more"
        )
    if (size := architectures.head_dim(config)) * config.num_attention_heads != config.hidden_size:
        yield f"norm_topk_prob is false and head_dim = {size}; without normalisation it takes hidden / heads"


def _bytes(config: Any) -> int:
    """Of a number; four where the config does not say."""
    return getattr(getattr(config, "dtype", None), "itemsize", 4)


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
