"""Dense parents that are read as another class, which computes the same: their config.json and their tensors.

Phi-3   q, k, v and gate, up are parts of fused matrices. Split, they are a Mistral's.
OLMo    LayerNorm without weights subtracts the mean of its input and divides by the root mean square. Where everything
        that is added to the residual has mean 0 over the hidden units, the mean is 0 already, and RMSNorm computes the
        same. So embeddings, o_proj and down_proj lose their mean over the hidden units, once, in float64
        (after SliceGPT, arXiv 2401.15024, 3.2). The output head then sees no mean either, and a tied one may lose it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tasks import architectures, layout

if TYPE_CHECKING:
    from torch import Tensor

_CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "tie_word_embeddings", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
    "rope_theta", "rope_scaling", "rope_parameters", "quantization_config", "head_dim",
)  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    architectures.PHI3.model_type: {
        "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1,
        "eos_token_id": 32000, "pad_token_id": 32000, "sliding_window": None,
    },
    architectures.OLMO.model_type: {
        "vocab_size": 50304, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": 50279,
        "pad_token_id": 1,
    },
}  # fmt: skip
"""Of transformers' config classes, where those of the class that it becomes are others."""
_OLMO_EPSILON = 1e-5


def refuses(fields: Mapping[str, Any]) -> str | None:
    """Why a config.json of such a class cannot be read as the other; None if it can."""
    kind = fields.get("model_type")
    if kind == architectures.OLMO.model_type and fields.get("clip_qkv") is not None:
        return f"clip_qkv = {fields['clip_qkv']!r}: no class that is written without norms on q and k clips them"
    if kind == architectures.PHI3.model_type:
        share = _rope(fields).get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
        if share != 1:
            return f"partial_rotary_factor = {share!r}: every sparse class here turns whole heads"
        for name in ("resid_pdrop", "embd_pdrop"):
            if fields.get(name):
                return f"{name} = {fields[name]!r}: no sparse class here drops residuals or embeddings in training"
    return None


def config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Content of config.json as the class that it is read as; that of other classes, or what is refused, unchanged."""
    row = architectures.REWRITTEN.get(str(fields.get("model_type")))
    if row is None or refuses(fields):
        return dict(fields)
    known = _DEFAULTS[row.model_type] | {"num_key_value_heads": fields.get("num_attention_heads")}
    made = {name: fields[name] for name in _CARRIED if name in fields}
    made = known | {name: value for name, value in made.items() if value is not None or name not in known}
    made |= {"model_type": row.becomes.model_type, "architectures": [row.becomes.architecture]}
    if row is architectures.OLMO:
        return made | {"rms_norm_eps": _OLMO_EPSILON, "attention_bias": fields.get("attention_bias", False)}
    rope = _rope(fields)
    for name in ("rope_parameters", "rope_scaling"):
        made.pop(name, None)
    made |= {"sliding_window": fields.get("sliding_window"), "rope_theta": rope.pop("rope_theta", None)}
    made["rope_theta"] = made["rope_theta"] or fields.get("rope_theta") or 10_000.0
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind) or "default"
    rope.pop("partial_rotary_factor", None)
    if kind != "default":  # "su" and "yarn" are its first names
        original = fields.get("original_max_position_embeddings", known["max_position_embeddings"])
        made["rope_scaling"] = {"original_max_position_embeddings": original} | rope | {"rope_type": "longrope"}
    return made


def tensor(name: str, fields: Mapping[str, Any], read: Callable[[str], Tensor]) -> Tensor:
    """A tensor by its name in the class that a checkpoint is read as.

    Args:
        name: of the tensor.
        fields: content of the checkpoint's own config.json.
        read: gives the checkpoint's own tensors.
    """
    kind = fields.get("model_type")
    if kind == architectures.PHI3.model_type:
        return _split(name, fields, read)
    if kind == architectures.OLMO.model_type:
        return _centred(name, fields, read)
    return read(name)


def _split(name: str, fields: Mapping[str, Any], read: Callable[[str], Tensor]) -> Tensor:
    made = config(fields)
    block, _, part = name.removesuffix(".weight").rpartition(".")
    if part in ("gate_proj", "up_proj"):
        gate, up = read(f"{block}.gate_up_proj.weight").chunk(2)
        return gate if part == "gate_proj" else up
    if part in ("q_proj", "k_proj", "v_proj"):
        width = made.get("head_dim") or made["hidden_size"] // made["num_attention_heads"]
        queries, keys = made["num_attention_heads"] * width, made["num_key_value_heads"] * width
        whole = read(f"{block}.qkv_proj.weight")
        piece: Tensor = whole.split([queries, keys, keys])["qkv".index(part[0])]
        return piece
    return read(name)


def _centred(name: str, fields: Mapping[str, Any], read: Callable[[str], Tensor]) -> Tensor:
    if "norm" in name:
        return read(layout.EMBEDDINGS).new_ones(fields["hidden_size"])
    stored = read(name)
    over = 1 if name == layout.EMBEDDINGS else 0
    if name != layout.EMBEDDINGS and not name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight")):
        return stored
    exact = stored.double()
    return (exact - exact.mean(over, keepdim=True)).to(stored.dtype)


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    return dict(rope) if isinstance(rope, dict) else {}
