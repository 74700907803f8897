"""Qwen3MoeForCausalLM: norms on queries and keys, dense layers among the sparse ones, no shared experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, Qwen3MoeConfig

from tasks import architectures, layout
from tasks.partition.exporters.base import Exporter, SparseLayer
from tasks.partition.exporters.qwen2_moe import routed, sparse_fields
from tasks.settings import Partition


class Qwen3Moe(Exporter):
    row = architectures.QWEN3_MOE

    def _config(self, common: dict[str, Any], dense: Any, *, partition: Partition) -> PreTrainedConfig:
        sliding = architectures.windows(dense)[0]
        head_dim = {"head_dim": architectures.head_dim(dense)}  # no field in transformers 5, but always published
        return Qwen3MoeConfig(
            **common | sparse_fields(dense, partition) | head_dim,
            attention_bias=architectures.biases(dense) == "qkvo",
            use_sliding_window=sliding is not None,
            sliding_window=sliding,
        )

    def layer(self, i: int, sparse: SparseLayer, dense: PreTrainedConfig) -> dict[str, Tensor]:
        return routed(f"{layout.block(i)}.mlp", sparse)
