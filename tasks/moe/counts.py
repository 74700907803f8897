"""Sizes, parameters and FLOPs of every model class that is known here, from the config alone.

FLOPs count each multiply-add of a matrix product as two and leave out norms, activations and softmax. Attention counts
all seq_len x seq_len scores, masked or not, as PyTorch's FlopCounterMode does. Training everything is three times a
forward pass. What is computed twice by choice (gradient checkpointing) and other models' passes (distillation) are not
in it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks import architectures

if TYPE_CHECKING:
    from tasks.settings.pretrain import What


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a model is made of, in parameters; FFNs in those of one layer."""

    layers: int
    sparse: int
    hidden: int
    head: int
    tied: bool
    attention: int
    attention_width: int
    vectors: int
    """Biases and norms of a layer: no matrix products."""
    router: int
    experts: int
    top_k: int
    expert: int
    shared: int
    shared_gate: int
    ffn: int
    ffn_bias: int


def experts(config: Any) -> dict[str, Any]:
    """The experts of a model, whatever its class calls their sizes.

    Args:
        config: a config of a known class, or its dict; fields that a dict leaves out have their class's defaults.

    Returns:
        layers: the numbers of the sparse layers; experts and top_k: the routed ones of a layer, and those that a token
        passes; expert_size: neurons of a routed expert; shared_size: neurons of a layer's shared experts together.
        A dense model has no such layers, and zeros.

    Raises:
        ValueError: a class that is not known here.
    """
    config = _object(config)
    row = architectures.row(config)
    if isinstance(row, architectures.Dense):
        return {"layers": [], "experts": 0, "top_k": 0, "expert_size": 0, "shared_size": 0}
    return {
        "layers": architectures.sparse_layers(config),
        "experts": getattr(config, row.experts),
        "top_k": config.num_experts_per_tok,
        "expert_size": getattr(config, row.expert_size),
        "shared_size": getattr(config, row.shared_size) if row.shared_size else 0,
    }


def parameters(config: Any) -> dict[str, int]:
    """Count parameters.

    Args:
        config: as in `experts`.

    Returns:
        total; active: all but the routed experts that a token does not pass; embedding: token embedding and output
        head (once if tied); ffn: the FFNs of all layers, routers left out, of which experts: the routed experts (0 in
        a dense model) and shared: the shared ones; router: with the gates of shared experts.
    """
    p = _parts(_object(config))
    embedding = p.head * (1 if p.tied else 2)
    dense = (p.layers - p.sparse) * (p.ffn + p.ffn_bias)
    shared, router = p.sparse * p.shared, p.sparse * (p.router + p.shared_gate)
    common = p.layers * (p.attention + p.vectors) + dense + shared + router + p.hidden + embedding
    return {
        "total": common + p.sparse * p.experts * p.expert,
        "active": common + p.sparse * p.top_k * p.expert,
        "embedding": embedding,
        "ffn": dense + shared + p.sparse * p.experts * p.expert,
        "experts": p.sparse * p.experts * p.expert,
        "shared": shared,
        "router": router,
    }


def flops_per_token(config: Any, *, seq_len: int, what: What = "all") -> dict[str, int]:
    """Floating-point operations per token of a sequence of `seq_len` tokens: {forward, train}.

    Training an elastic model draws top_k for each step, and `train` is the mean over its values.

    Args:
        config: as in `experts`.
        what: is trained: all; experts, the routers and all experts, shared ones too; router. A product costs a forward
            pass once more for the gradient of its input, if anything below it is trained, and once more for that of
            its weight, if it is trained.

    Raises:
        ValueError: a dense model has neither routers nor experts.
    """
    config = _object(config)
    p, sparse = _parts(config), experts(config)["layers"]
    if what != "all" and not sparse:
        raise ValueError(f"config.json: model_type = {config.model_type!r} has no {what} to train alone")
    routing, chosen, shared = p.router, p.top_k * p.expert, p.shared + p.shared_gate
    scores = 2 * p.attention_width * seq_len
    layers = p.layers * (p.attention + scores) + p.sparse * (routing + chosen + shared) + (p.layers - p.sparse) * p.ffn
    forward = layers + p.head
    if elastic := architectures.elastic(config):
        shares = [flops_per_token(at_top_k(config, k), seq_len=seq_len, what=what)["train"] for k in elastic]
        return {"forward": 2 * forward, "train": round(sum(shares) / len(shares))}
    if what == "all":
        return {"forward": 2 * forward, "train": 6 * forward}
    lowest = sparse[0]  # the input of its block has no gradient
    sparse_above, layers_above = p.sparse - 1, p.layers - lowest - 1
    inputs = (  # two more products for each of attention's two, since both sides of them have gradients
        layers_above * (p.attention + 2 * scores)
        + sparse_above * (routing + chosen + shared)
        + (layers_above - sparse_above) * p.ffn
        + p.head
    )
    weights = p.sparse * routing
    if what == "experts":
        weights += p.sparse * (chosen + shared)
        inputs += (chosen + p.shared) // 3  # in the lowest too, down_proj's input has one
    return {"forward": 2 * forward, "train": 2 * (forward + inputs + weights)}


def recomputed_flops_per_token(config: Any, *, seq_len: int) -> int:
    """What gradient checkpointing adds to training on a token: the blocks' forward pass again, without the head.

    With it, training everything is 4 forward passes of the blocks and 3 of the head (Narayanan et al. 2021, arXiv
    2104.04473, appendix).
    """
    config = _object(config)
    return flops_per_token(config, seq_len=seq_len)["forward"] - 2 * _parts(config).head


def prompt_flops(config: Any, *, tokens: int) -> int:
    """FLOPs of reading a prompt at once, up to the choice of the next token: the head sees the last position alone."""
    config = _object(config)
    return tokens * flops_per_token(config, seq_len=tokens)["forward"] - 2 * (tokens - 1) * _parts(config).head


def decode_flops(config: Any, *, context: int) -> int:
    """FLOPs of reading one token after `context` others that are cached; its query meets them and itself."""
    return flops_per_token(config, seq_len=context + 1)["forward"]


def at_top_k(config: Any, top_k: int) -> Any:
    """The config of a sparse model that serves one `top_k`, in the place of those that it was made for."""
    at = copy.copy(_object(config))
    at.num_experts_per_tok = top_k
    setattr(at, architectures.ELASTIC, None)
    return at


def _object(config: Any) -> Any:
    """A config as transformers makes it, so that fields which are left out have the defaults of their class."""
    architectures.row(config)  # refuses a class that is not known
    if not isinstance(config, dict):
        return config
    from transformers import AutoConfig

    return AutoConfig.for_model(**config)


def _parts(config: Any) -> _Parts:
    row, e = architectures.row(config), experts(config)
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, architectures.head_dim(config)
    queries, keys = heads * head_dim, config.num_key_value_heads * head_dim
    bias = sum({"q": queries, "k": keys, "v": keys, "o": hidden}[name] for name in architectures.biases(config))
    norms = 2 * hidden + (2 * head_dim if row.qk_norm else 0)
    return _Parts(
        layers=config.num_hidden_layers,
        sparse=len(e["layers"]),
        hidden=hidden,
        head=config.vocab_size * hidden,
        tied=config.tie_word_embeddings,
        attention=2 * hidden * queries + 2 * hidden * keys,
        attention_width=queries,
        vectors=bias + norms,
        router=hidden * e["experts"],
        experts=e["experts"],
        top_k=e["top_k"],
        expert=3 * hidden * e["expert_size"],
        shared=3 * hidden * e["shared_size"],
        shared_gate=hidden if row.shared_gate else 0,
        ffn=3 * hidden * config.intermediate_size,
        ffn_bias=2 * config.intermediate_size + hidden if getattr(config, "mlp_bias", False) else 0,
    )
