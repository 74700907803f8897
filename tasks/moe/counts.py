"""Parameters and FLOPs of Llama, Mixtral and GraniteMoeShared models, from the config alone.

FLOPs count each multiply-add of a matrix product as two and leave out norms, activations and softmax. Attention counts
all seq_len x seq_len scores, masked or not, as PyTorch's FlopCounterMode does. Training is three times a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from tasks.settings import Shape

MODEL_TYPES = ("llama", "mixtral", "granitemoeshared")


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """One layer's parts, in parameters, and what they are multiplied by."""

    layers: int
    hidden: int
    vocabulary: int
    tied: bool
    attention: int
    attention_bias: int
    attention_width: int
    router: int
    expert: int
    experts: int
    top_k: int
    shared: int


def parameters(config: Any) -> dict[str, int]:
    """Count parameters.

    Args:
        config: a Llama, Mixtral or GraniteMoeShared config, or its dict.

    Returns:
        total; active: all but the routed experts that a token does not pass; embedding: token embedding and output
        head (once if tied); ffn: the FFNs of all layers, routers left out, of which experts: the routed experts (0 in
        a dense model) and shared: the shared ones; router.
    """
    s = _sizes(config)
    embedding = s.vocabulary * s.hidden * (1 if s.tied else 2)
    common = s.layers * (s.attention + s.attention_bias + 2 * s.hidden + s.router + s.shared) + s.hidden + embedding
    return {
        "total": common + s.layers * s.experts * s.expert,
        "active": common + s.layers * s.top_k * s.expert,
        "embedding": embedding,
        "ffn": s.layers * (s.experts * s.expert + s.shared),
        "experts": s.layers * s.experts * s.expert if s.router else 0,
        "shared": s.layers * s.shared,
        "router": s.layers * s.router,
    }


def flops_per_token(config: Any, *, seq_len: int) -> dict[str, int]:
    """Floating-point operations per token of a sequence of `seq_len` tokens: {forward, train}."""
    s = _sizes(config)
    products = s.layers * (s.attention + s.router + s.shared + s.top_k * s.expert) + s.vocabulary * s.hidden
    scores = 2 * s.layers * s.attention_width * seq_len
    forward = 2 * (products + scores)
    return {"forward": forward, "train": 3 * forward}


def dense_config(shape: Shape) -> LlamaConfig:
    """The LlamaConfig of a shape in pipelines.yaml; fields that the shape leaves out keep their defaults."""
    from transformers import LlamaConfig

    return LlamaConfig(**shape.model_dump(exclude_none=True))


def _sizes(config: Any) -> _Sizes:
    fields = config if isinstance(config, dict) else config.to_dict()
    kind = fields["model_type"]
    if kind not in MODEL_TYPES:
        raise ValueError(f"config.json: model_type = {kind!r} is not counted; known: {', '.join(MODEL_TYPES)}")
    hidden, width, heads = fields["hidden_size"], fields["intermediate_size"], fields["num_attention_heads"]
    kv_heads = fields.get("num_key_value_heads") or heads
    head_dim = fields.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, kv_heads * head_dim
    moe = kind != "llama"
    experts = fields["num_local_experts"] if moe else 1
    expert = 3 * hidden * width + (2 * width + hidden if fields.get("mlp_bias") else 0)
    return _Sizes(
        layers=fields["num_hidden_layers"],
        hidden=hidden,
        vocabulary=fields["vocab_size"],
        tied=fields.get("tie_word_embeddings", False),
        attention=2 * hidden * queries + 2 * hidden * keys,
        attention_bias=queries + 2 * keys + hidden if fields.get("attention_bias") else 0,
        attention_width=queries,
        router=hidden * experts if moe else 0,
        expert=expert,
        experts=experts,
        top_k=fields["num_experts_per_tok"] if moe else 1,
        shared=3 * hidden * fields.get("shared_intermediate_size", 0),
    )
