"""Qwen2MoeForCausalLM: q, k, v biases, dense layers among the sparse ones, any sliding windows.

It always has a shared expert, behind a sigmoid gate. With a zero gate that is one half for every token, so the shared
down-projection is stored doubled, which is exact. Without shared experts it is a few neurons of zero weight, since
transformers warns of a width of 0 at every load. Biases are written even where the parent has none, as zeros: vLLM
reads them always, and leaves what it does not find uninitialised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, Qwen2MoeConfig

from tasks import architectures, layout
from tasks.partition.exporters.base import Exporter, SparseLayer, odd_head_dim
from tasks.settings import Partition


class Qwen2Moe(Exporter):
    row = architectures.QWEN2_MOE

    def _config(self, common: dict[str, Any], dense: Any, *, partition: Partition) -> PreTrainedConfig:
        fields = common | odd_head_dim(dense) | sparse_fields(dense, partition)
        seen, shared = architectures.windows(dense), partition.shared_experts * fields["moe_intermediate_size"]
        sliding = next(filter(None, seen), None)
        return Qwen2MoeConfig(
            **fields,
            shared_expert_intermediate_size=shared or architectures.IDLE,
            qkv_bias=True,
            use_sliding_window=sliding is not None,
            sliding_window=sliding,
            max_window_layers=seen.index(sliding) if sliding else len(seen),  # read by transformers 4
            layer_types=["sliding_attention" if width else "full_attention" for width in seen],
        )

    def extra(self, i: int, dense: PreTrainedConfig, *, dtype: torch.dtype) -> dict[str, Tensor]:
        if architectures.biases(dense):
            return {}
        size = architectures.head_dim(dense)
        heads = {"q": dense.num_attention_heads, "k": dense.num_key_value_heads, "v": dense.num_key_value_heads}
        prefix = f"{layout.block(i)}.self_attn"
        return {f"{prefix}.{name}_proj.bias": torch.zeros(n * size, dtype=dtype) for name, n in heads.items()}

    def layer(self, i: int, sparse: SparseLayer, dense: PreTrainedConfig) -> dict[str, Tensor]:
        prefix = f"{layout.block(i)}.mlp"
        tensors = routed(prefix, sparse)
        gate = sparse.gate_EFD
        idle = gate.new_zeros(architectures.IDLE, gate.shape[2])
        shared = sparse.shared or (idle, idle.clone(), sparse.down_EDF.new_zeros(gate.shape[2], architectures.IDLE))
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), shared, strict=True):
            tensors[f"{prefix}.shared_expert.{name}.weight"] = weight * 2 if name == "down_proj" else weight
        tensors[f"{prefix}.shared_expert_gate.weight"] = torch.zeros_like(sparse.router_ED[:1])
        return tensors


def sparse_fields(dense: Any, partition: Partition) -> dict[str, Any]:
    """Fields of the config that Qwen's classes have in common."""
    layers = dense.num_hidden_layers
    return {
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": partition.check_width(dense.intermediate_size),
        "num_experts": partition.experts,
        "norm_topk_prob": not partition.elastic,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(set(range(layers)) - set(partition.sparse_layers(layers))),
    }


def routed(prefix: str, sparse: SparseLayer) -> dict[str, Tensor]:
    """Router and routed experts by the names of Qwen's classes."""
    tensors = {f"{prefix}.gate.weight": sparse.router_ED}
    for e, (gate, up, down) in enumerate(zip(sparse.gate_EFD, sparse.up_EFD, sparse.down_EDF, strict=True)):
        tensors[f"{prefix}.experts.{e}.gate_proj.weight"] = gate
        tensors[f"{prefix}.experts.{e}.up_proj.weight"] = up
        tensors[f"{prefix}.experts.{e}.down_proj.weight"] = down
    return tensors
