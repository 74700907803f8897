"""Decoder layers of transformers: how experts and routers are found, how one layer is loaded and called by itself."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class SparseFfn:
    """The FFN of a sparse decoder layer of any class; the tensors are views, so writing to them alters the layer.

    Shapes: E routed experts, F neurons of each, D hidden, M neurons of the shared experts together, 0 without any.
    """

    router: Any
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor
    shared_gate_MD: Tensor
    shared_up_MD: Tensor
    shared_down_DM: Tensor
    shared_switch_1D: Tensor | None
    """Its sigmoid is what the shared experts' output is multiplied by; None in a class without."""


def sparse_ffn(block: nn.Module) -> SparseFfn:
    """The parts of a sparse decoder layer's FFN. Raises ValueError for a layer that has no experts."""
    modules: dict[str, Any] = {}
    for name, module in block.named_modules():
        part = "experts" if is_experts(module) else "router" if is_router(module) else name
        modules[part.rpartition(".")[2]] = module
    if "experts" not in modules or "router" not in modules:
        raise ValueError(f"{type(block).__name__} has no experts")
    experts, switch = modules["experts"], modules.get("shared_expert_gate")
    gate_EFD, up_EFD = experts.gate_up_proj.data.chunk(2, dim=1)
    if granite := modules.get("shared_mlp"):
        shared = (*granite.input_linear.weight.data.chunk(2), granite.output_linear.weight.data)
    elif qwen := modules.get("shared_expert"):
        shared = (qwen.gate_proj.weight.data, qwen.up_proj.weight.data, qwen.down_proj.weight.data)
    else:
        none_MD = gate_EFD.new_empty(0, gate_EFD.shape[2])
        shared = (none_MD, none_MD, none_MD.T)
    return SparseFfn(
        router=modules["router"],
        gate_EFD=gate_EFD,
        up_EFD=up_EFD,
        down_EDF=experts.down_proj.data,
        shared_gate_MD=shared[0],
        shared_up_MD=shared[1],
        shared_down_DM=shared[2],
        shared_switch_1D=None if switch is None else switch.weight.data,
    )


def run_experts_by_loop(block: nn.Module) -> None:
    """Let a decoder layer's experts run by transformers' own loop, which takes any dtype and copies no weights."""
    for module in block.modules():
        if is_experts(module):
            module.config._experts_implementation = "eager"  # type: ignore[union-attr]


def decoder_layers(model: nn.Module) -> Any:
    """The decoder layers of a causal language model, in order."""
    return model.base_model.layers  # type: ignore[union-attr]


def hand_inputs(model: nn.Module) -> None:
    """In each forward pass of a decoder layer, give its modules the inputs that they name in `needs`.

    They stand in a module's `inputs`, flat [T]. The layers of one pass share a tensor of the rotary embedding, and the
    inputs are an attribute of it. Gradient checkpointing computes a layer's forward again, without the hooks of the
    layer, but with the same arguments: the hook of its attention, inside, finds the inputs of that pass.
    """
    ids: list[Tensor] = []

    def enter(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids[:] = [kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]]

    def attach(_layer: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        cos: Any = kwargs["position_embeddings"][0]
        if not hasattr(cos, "inputs"):
            positions_BL = kwargs["position_ids"].expand(ids[0].shape)
            cos.inputs = {"input_ids": ids[0].flatten(), "position_ids": positions_BL.flatten()}

    def hand(readers: list[Any], kwargs: dict[str, Any]) -> None:
        for module in readers:
            module.inputs = {name: kwargs["position_embeddings"][0].inputs[name] for name in module.needs}

    asking = False
    for layer in decoder_layers(model):
        if readers := [part for part in layer.modules() if getattr(part, "needs", None)]:
            layer.register_forward_pre_hook(attach, with_kwargs=True)
            layer.self_attn.register_forward_pre_hook(
                lambda _attention, _args, kwargs, readers=readers: hand(readers, kwargs), with_kwargs=True
            )
            asking = True
    if asking:
        base: Any = model.base_model
        base.register_forward_pre_hook(enter, with_kwargs=True)


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
