"""Decoder layers of transformers: how experts and routers are found, how one layer is loaded and called by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def is_router(module: nn.Module) -> bool:
    """True for a router: it gives (logits, weights, choice) for [T, D], by its `weight` [E, D] and `top_k`."""
    return type(module).__name__.endswith("TopKRouter")


def is_experts(module: nn.Module) -> bool:
    """True for routed experts: `gate_up_proj` [E, 2 F, D], the gate first, and `down_proj` [E, D, F]."""
    return type(module).__name__.endswith("Experts")


def run_experts_by_loop(block: nn.Module) -> None:
    """Let a decoder layer's experts run by transformers' own loop, which takes any dtype and copies no weights."""
    for module in block.modules():
        if is_experts(module):
            module.config._experts_implementation = "eager"  # type: ignore[union-attr]


def decoder_layers(model: nn.Module) -> Any:
    """The decoder layers of a causal language model, in order."""
    return model.base_model.layers  # type: ignore[union-attr]


def skeleton(config: PreTrainedConfig) -> Any:
    """A model of this config without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load(
    family: Any, config: PreTrainedConfig, *, state: dict[str, Tensor], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A float32 model from weights in memory, with their published names, and what did not fit: {kind: names}."""
    model, notes = family.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported in the notes, with the others
        **options,
    )
    return model, {kind: sorted(map(str, names)) for kind, names in notes.items() if names}


def rotary(model: Any, config: PreTrainedConfig) -> nn.Module:
    """The rotary embedding of a model's class for another config; called with (any tensor, positions [1, L])."""
    made: nn.Module = type(model.model.rotary_emb)(config=config)
    return made


def attention_mask(config: PreTrainedConfig, hidden_BLD: Tensor, *, sliding: bool) -> Tensor | None:
    """The mask of a layer's attention, bool [1, 1, L, L]; None where plain causal attention is meant."""
    make: Any = create_sliding_window_causal_mask if sliding else create_causal_mask
    mask: Tensor | None = make(config, hidden_BLD, None, None)  # the last one's name has changed in 5.23
    return mask


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep the input of each layer alone, and compute the layer again in the backward pass."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None)  # from 5.23 on, which warns of the old name
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
