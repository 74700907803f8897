"""The sparse model out of the dense one: stock Hugging Face classes, every source tensor accounted for by name.

    no shared experts    MixtralForCausalLM
    shared experts       GraniteMoeSharedForCausalLM: they form one ungated FFN beside the routed ones

Both normalise the weights of the chosen experts to sum 1; the sum that the settings ask for is folded into down_proj.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tasks.partition.index import Index

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

    from tasks.settings import Partition

_FFN = ("gate_proj", "up_proj", "down_proj")
_CARRIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def scale(partition: Partition) -> float:
    """What the routed experts' weights sum to (settings.Partition.scale)."""
    experts, top_k = partition.experts, partition.top_k
    return {
        "unit": float(top_k),
        "paper": experts / top_k,
        "mean": float(experts),
        "variance": math.sqrt(top_k * experts),
    }[partition.scale]


def moe_config(dense: PreTrainedConfig, partition: Partition) -> PreTrainedConfig:
    """Config of the sparse model.

    Raises:
        ValueError: the dense config has something that the sparse class cannot express, or the experts do not divide
            its FFN.
    """
    from transformers import GraniteMoeSharedConfig, MixtralConfig

    size = partition.check_width(dense.intermediate_size)
    shared = partition.shared_experts
    if dense.hidden_act != "silu":
        raise ValueError(
            f"config.json: hidden_act = {dense.hidden_act!r}; experts are built of SwiGLU FFNs only (silu)"
        )
    if dense.mlp_bias:
        raise ValueError("config.json: mlp_bias = true; no sparse class here has biases in its experts")
    if dense.attention_bias and not shared:
        raise ValueError(
            "config.json: attention_bias = true, which Mixtral has not; set partition.shared_experts >= 1"
        )
    fields: dict[str, Any] = {name: getattr(dense, name) for name in _CARRIED}
    fields |= {
        "intermediate_size": size,
        "num_local_experts": partition.experts,
        "num_experts_per_tok": partition.top_k,
        "output_router_logits": False,
        "dtype": dense.dtype,
    }
    head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    if not shared:
        return MixtralConfig(**fields, head_dim=head_dim, sliding_window=None)
    if head_dim != dense.hidden_size // dense.num_attention_heads:
        fields["head_dim"] = head_dim  # not a field of this config class, but its attention reads it
    return GraniteMoeSharedConfig(
        **fields,
        shared_intermediate_size=shared * size,
        attention_bias=dense.attention_bias,
        attention_multiplier=head_dim**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
    )


def convert(
    dense: LlamaForCausalLM, index: Index, routers: list[torch.Tensor], *, partition: Partition
) -> PreTrainedModel:
    """Build the sparse model in the dense one's dtype.

    Args:
        dense: the parent.
        index: neurons of every expert.
        routers: per layer the router's weight [E, D].
        partition: sizes and scale.

    Raises:
        ValueError: the index is no partition of the FFN, or a source tensor has no place in the sparse model.
    """
    from transformers import AutoModelForCausalLM

    if problems := index.problems(dense.config.intermediate_size):
        raise ValueError("; ".join(problems))
    source = dict(dense.state_dict())
    target: dict[str, torch.Tensor] = {}
    for layer, experts_EF in enumerate(index.layers):
        gate, up, down = (source.pop(f"model.layers.{layer}.mlp.{name}.weight") for name in _FFN)
        place_EF = torch.from_numpy(experts_EF.astype("int64")).to(gate.device)
        routed_EF, shared_N = place_EF[index.shared_experts :], place_EF[: index.shared_experts].reshape(-1)
        down_EDF = down[:, routed_EF].transpose(0, 1) * scale(partition)
        block, gate_name = ("block_sparse_moe", "router") if index.shared_experts else ("mlp", "gate")
        prefix = f"model.layers.{layer}"
        target[f"{prefix}.{block}.{gate_name}.weight"] = routers[layer].to(gate)
        target[f"{prefix}.{block}.experts.gate_up_proj"] = torch.cat([gate[routed_EF], up[routed_EF]], dim=1)
        target[f"{prefix}.{block}.experts.down_proj"] = down_EDF.contiguous()
        if index.shared_experts:
            target[f"{prefix}.shared_mlp.input_linear.weight"] = torch.cat([gate[shared_N], up[shared_N]])
            target[f"{prefix}.shared_mlp.output_linear.weight"] = down[:, shared_N].contiguous()
    config = moe_config(dense.config, partition)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    wanted = set(model.state_dict())
    target |= {name: source.pop(name) for name in wanted & set(source)}
    if source or wanted != set(target):
        raise ValueError(
            f"{type(dense).__name__} and {type(model).__name__} do not hold the same tensors: no place for "
            f"{sorted(source)[:8]}, nothing for {sorted(wanted - set(target))[:8]}"
        )
    model.load_state_dict(target, strict=True)
    model.tie_weights()
    torch.nn.Module.to(model, dense.device)
    return model.eval()


def write(model: PreTrainedModel, folder: Path, *, tokenizer_from: Path) -> None:
    """Write the checkpoint with its parent's tokenizer and generation config into a new folder."""
    from tasks.moe import files

    folder.mkdir()
    files.save(model, folder)
    files.copy_tokenizer(tokenizer_from, folder)
