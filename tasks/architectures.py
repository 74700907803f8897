"""The model classes that are known here, a row each. Everything that depends on a class reads its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

Biases = Literal["", "qkv", "qkvo"]
"""Which projections of the attention have biases."""
Windows = Literal["none", "uniform", "per layer"]
"""Whether the attention has sliding windows: none, `sliding_window` in all layers, or by `layer_types`."""


@dataclass(frozen=True)
class LlamaCpp:
    """An architecture of llama.cpp, which a GGUF file has."""

    name: str
    _: KW_ONLY
    of_llama: bool = False
    """Its rotary embedding pairs neighbours, where transformers pairs halves, and reads rope_freqs.weight."""
    scales: bool = False
    """It has Granite's multipliers."""


@dataclass(frozen=True, kw_only=True)
class _Architecture:
    model_type: str
    architecture: str
    """Class of transformers."""
    biases: Biases = ""
    bias_field: str | None = None
    """The config field that turns the biases on; None: they are always there."""
    qk_norm: bool = False
    """Norms over each head of queries and keys."""
    window: Windows = "none"
    shared_gate: bool = False
    """A sigmoid gate before the shared experts; a dense class has none."""
    multipliers: bool = False
    """On embeddings, residuals, attention scores and logits; see MULTIPLIERS."""
    llama_cpp: LlamaCpp | None = None
    """What a GGUF file of it is written as; None: it is not."""


@dataclass(frozen=True, kw_only=True)
class Dense(_Architecture):
    """Dense models that can become sparse: SwiGLU FFNs of three matrices, RMSNorm before attention and FFN."""

    head_dim: bool = True
    """config.json gives the width of a head; else it is hidden_size / num_attention_heads."""
    gguf: bool = False
    """Read from GGUF files too, whose name for it is the model_type."""


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """Dense models that are read as another class, which computes the same (tasks/rewritten.py)."""

    model_type: str
    architecture: str
    becomes: Dense


@dataclass(frozen=True, kw_only=True)
class Sparse(_Architecture):
    """Sparse models that are written: softmax over the chosen experts' logits, or over all (`unnormalised`)."""

    experts: str
    """Config field of the number of routed experts."""
    expert_size: str
    """Config field of the neurons of a routed expert."""
    shared_size: str | None = None
    """Config field of the neurons of the shared experts together; None: there are none."""
    shared_always: bool = False
    """The class makes no sense without shared experts."""
    dense_layers: bool = False
    """Some layers may stay dense (`mlp_only_layers`, `decoder_sparse_step`)."""
    router: Literal["gate", "router"] = "gate"
    """The router's attribute in the sparse block."""
    stored_router: str
    """Name of the router's weight in published checkpoints, behind `model.layers.N.`."""
    autoep: Mapping[str, str]
    """How DeepSpeed's AutoEP finds the sparse blocks."""
    unnormalised: bool = False
    """With `norm_topk_prob: false` a weight is the expert's share of all, whatever the number of chosen ones."""
    llama_cpp_unnormalised: LlamaCpp | None = None
    """`llama_cpp` of those."""
    names_in_4: Mapping[str, str] = field(default_factory=dict)
    """Fields that transformers 4 reads, and the fields that transformers 5 writes in their place."""


_LLAMA_CPP = LlamaCpp("llama", of_llama=True)
_LLAMA_CPP_GRANITE = LlamaCpp("granitemoe", of_llama=True, scales=True)
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")

LLAMA = Dense(
    model_type="llama",
    architecture="LlamaForCausalLM",
    llama_cpp=_LLAMA_CPP,
    biases="qkvo",
    bias_field="attention_bias",
    gguf=True,
)
MISTRAL = Dense(model_type="mistral", architecture="MistralForCausalLM", llama_cpp=_LLAMA_CPP, window="uniform")
QWEN2 = Dense(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    head_dim=False,
    llama_cpp=LlamaCpp("qwen2"),
    biases="qkv",
    window="per layer",
    gguf=True,
)
QWEN3 = Dense(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    llama_cpp=LlamaCpp("qwen3"),
    biases="qkvo",
    bias_field="attention_bias",
    qk_norm=True,
    window="per layer",
    gguf=True,
)
GRANITE = Dense(
    model_type="granite",
    architecture="GraniteForCausalLM",
    head_dim=False,
    llama_cpp=LlamaCpp("granite", of_llama=True, scales=True),
    biases="qkvo",
    bias_field="attention_bias",
    multipliers=True,
)
DENSE: Mapping[str, Dense] = {row.model_type: row for row in (LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE)}
PHI3 = Rewritten(model_type="phi3", architecture="Phi3ForCausalLM", becomes=MISTRAL)
OLMO = Rewritten(model_type="olmo", architecture="OlmoForCausalLM", becomes=LLAMA)
REWRITTEN: Mapping[str, Rewritten] = {row.model_type: row for row in (PHI3, OLMO)}

_GRANITE: dict[str, Any] = {
    "biases": "qkvo",
    "bias_field": "attention_bias",
    "multipliers": True,
    "llama_cpp": _LLAMA_CPP_GRANITE,
    "experts": "num_local_experts",
    "expert_size": "intermediate_size",
    "router": "router",
    "stored_router": "block_sparse_moe.router.layer.weight",
    "autoep": {"moe_layer_pattern": r"model\.layers\.\d+\.block_sparse_moe", "router_pattern": "router"},
}
MIXTRAL = Sparse(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    llama_cpp=_LLAMA_CPP,
    window="uniform",
    experts="num_local_experts",
    expert_size="intermediate_size",
    stored_router="block_sparse_moe.gate.weight",
    autoep={"preset_model": "mixtral"},
)
GRANITE_MOE_SHARED = Sparse(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    shared_size="shared_intermediate_size",
    shared_always=True,
    **_GRANITE,
)
GRANITE_MOE = Sparse(model_type="granitemoe", architecture="GraniteMoeForCausalLM", **_GRANITE)
QWEN2_MOE = Sparse(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    llama_cpp=_LLAMA_CPP_GRANITE,
    biases="qkv",
    bias_field="qkv_bias",
    window="per layer",
    experts="num_experts",
    expert_size="moe_intermediate_size",
    shared_size="shared_expert_intermediate_size",
    shared_gate=True,
    dense_layers=True,
    unnormalised=True,
    llama_cpp_unnormalised=LlamaCpp("deepseek", of_llama=True),
    stored_router="mlp.gate.weight",
    autoep={"preset_model": "qwen3_moe"},
)
IDLE = 8
"""Neurons of a Qwen2Moe's shared expert where there is none: all zero, and so is the gradient of the gate before them.
Rows of 16 bytes in bfloat16."""
QWEN3_MOE = Sparse(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    llama_cpp=LlamaCpp("qwen3moe"),
    biases="qkvo",
    bias_field="attention_bias",
    qk_norm=True,
    window="uniform",
    experts="num_experts",
    expert_size="moe_intermediate_size",
    dense_layers=True,
    unnormalised=True,
    stored_router="mlp.gate.weight",
    autoep={"preset_model": "qwen3_moe"},
    names_in_4={"num_experts": "num_local_experts"},
)
SPARSE: Mapping[str, Sparse] = {
    row.model_type: row for row in (MIXTRAL, GRANITE_MOE_SHARED, GRANITE_MOE, QWEN2_MOE, QWEN3_MOE)
}
"""In the order in which `target: auto` tries them."""
ALL: Mapping[str, Dense | Sparse] = {**DENSE, **SPARSE}

_GEGLU = "its FFN is GeGLU, and moe_kernels, llama.cpp, vLLM and SGLang compute SwiGLU in every class written here"
_POST_NORM = "it normalises behind the FFN, and experts are fitted here to what the FFN adds to the residual"
_NO_GATE = "its FFN has two matrices and no gate"
_SPARSE = "it is sparse already"
REFUSED: Mapping[str, str] = {
    "gemma": _GEGLU + ", GraniteMoe included, which holds it in transformers alone",
    "gemma2": _GEGLU,
    "gemma3_text": _GEGLU,
    "glm4": _POST_NORM,
    "olmo2": _POST_NORM + "; FlexOlmo would hold it",
    "olmo3": _POST_NORM,
    "cohere": "attention and FFN run side by side behind one LayerNorm",
    "stablelm": "it has LayerNorm and a partial rotary embedding",
    "smollm3": "some of its layers have no rotary embedding, which no sparse class here can say",
    "starcoder2": _NO_GATE,
    "phi": _NO_GATE,
    "gpt2": _NO_GATE,
    "gpt_neox": _NO_GATE,
    "falcon": _NO_GATE,
    "opt": _NO_GATE,
} | dict.fromkeys(SPARSE, _SPARSE)
"""Why a parent of this model_type is refused."""


def row(config: Any) -> Dense | Sparse:
    """The row of a config, object or dict. Raises ValueError for a class that is not known here."""
    kind = config["model_type"] if isinstance(config, dict) else config.model_type
    if kind not in ALL:
        raise ValueError(f"config.json: model_type = {kind!r} is not known here; known: {', '.join(ALL)}")
    return ALL[kind]


def is_moe(config: Any) -> bool:
    """True for the config (object or dict) of a sparse model."""
    return (config["model_type"] if isinstance(config, dict) else config.model_type) in SPARSE


def normalises(config: Any) -> bool:
    """True if the weights of a sparse model's chosen experts sum to 1, by a config object or dict."""
    fields = config if isinstance(config, dict) else vars(config)  # a dict may leave out its class's default
    return not elastic(config) and bool(fields.get("norm_topk_prob", True))


def llama_cpp(config: Any) -> LlamaCpp | None:
    """What a GGUF file of a model is written as, by a config object or dict; None: there is nothing for it."""
    known = row(config)
    return known.llama_cpp if normalises(config) else getattr(known, "llama_cpp_unnormalised", None)


ELASTIC = "elastic_top_k"  # a field of config.json, of this project alone


def elastic(config: Any) -> list[int]:
    """The values of top_k that a model was made for, by a config object or dict; empty if it has one."""
    return list((config if isinstance(config, dict) else vars(config)).get(ELASTIC) or [])


def biases(config: Any) -> Biases:
    """Which projections of the attention have biases, by a config object."""
    known = row(config)
    return known.biases if known.bias_field is None or getattr(config, known.bias_field) else ""


def windows(config: Any) -> list[int | None]:
    """The sliding window of each layer's attention, by a config object; None where it spans the whole text."""
    layers, known = config.num_hidden_layers, row(config)
    if known.window != "per layer":
        return [config.sliding_window if known.window == "uniform" else None] * layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


def head_dim(config: Any) -> int:
    """Width of one attention head, by a config object."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def multipliers(config: Any) -> dict[str, float]:
    """The values of MULTIPLIERS, by a config object; those that change nothing for a class that has none."""
    if row(config).multipliers:
        return {name: getattr(config, name) for name in MULTIPLIERS}
    return dict.fromkeys(MULTIPLIERS, 1.0) | {"attention_multiplier": head_dim(config) ** -0.5}


def sparse_layers(config: Any) -> list[int]:
    """The numbers of the layers that have experts, by a config object; none in a dense model."""
    known, layers = row(config), range(config.num_hidden_layers)
    if isinstance(known, Dense):
        return []
    if not known.dense_layers:
        return list(layers)
    return [i for i in layers if i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0]
