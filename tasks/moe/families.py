"""The dense families that can become sparse, why others cannot, and the tensors that a checkpoint of one holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks import layout, rewritten
from tasks.architectures import DENSE, REFUSED, REWRITTEN, Dense, Rewritten


def check(fields: Mapping[str, Any]) -> None:
    """Raise ValueError, with the reason where it is known, if a config.json is of no supported family."""
    kind, classes = fields.get("model_type"), fields.get("architectures") or []
    if not isinstance(kind, str | None) or not isinstance(classes, list):
        raise ValueError(
            f"config.json: model_type = {kind!r}, architectures = {classes!r}; needed: a name, and a list of names"
        )
    read: dict[str, Dense | Rewritten] = {**DENSE, **REWRITTEN}
    row = read.get(str(kind))
    if row is None or (classes and classes[0] != row.architecture):
        reason = REFUSED.get(str(kind), "it is not known whether its FFN can be cut into experts without a loss")
        if row is not None:
            reason = f"it is no causal language model of class {row.architecture}"
        supported = ", ".join(f"{known.model_type} ({known.architecture})" for known in read.values())
        raise ValueError(
            f"config.json: model_type = {kind!r}, architectures = {classes} is not supported: {reason}; "
            f"supported: {supported}"
        )
    if limit := rewritten.refuses(fields):
        raise ValueError(f"config.json: model_type = {kind!r} is not supported with {limit}")
    if quantised := fields.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"config.json: quantization_config.quant_method = {method!r}: its weights are not plain numbers; name the "
            "checkpoint that it was made from"
        )
    for field in ("rope_parameters", "rope_scaling"):
        rope = fields.get(field) or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(
                f"config.json: {field} = {rope!r}; needed: one table for all layers, since no sparse class here has "
                "rotary embeddings by kind of layer"
            )
        part = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
        if part not in (None, 1):
            raise ValueError(
                f"config.json: partial_rotary_factor = {part!r}: transformers rotates whole heads in a {kind}, and "
                "vLLM would rotate a part of each; remove the field if the checkpoint was trained with whole ones"
            )


def expected(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config stores; a tied head is not among them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[layout.HEAD]
    return shapes


def account(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError naming the tensors that a source lacks, has too many, or has in another shape."""
    missing = [name for name in wanted if name not in stored]
    extra = sorted(stored.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"does not hold the tensors of its config: {len(missing)} missing ({', '.join(missing[:5]) or 'none'}), "
            f"{len(extra)} unknown ({', '.join(extra[:5]) or 'none'})"
        )
    wrong = [
        f"{name} is {list(stored[name])}, by config.json {list(shape)}"
        for name, shape in wanted.items()
        if stored[name] != shape
    ]
    if wrong:
        raise ValueError(f"has {len(wrong)} tensors of another shape than its config: {'; '.join(wrong[:5])}")
