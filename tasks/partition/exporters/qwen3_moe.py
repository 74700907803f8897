"""Qwen3MoeForCausalLM: norms on queries and keys, dense layers among the sparse ones, no shared experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, Qwen3MoeConfig

from tasks import architectures
from tasks.partition.exporters.base import Exporter, SparseLayer
from tasks.partition.exporters.qwen2_moe import routed
from tasks.settings import Partition


class Qwen3Moe(Exporter):
    row = architectures.QWEN3_MOE

    def _config(self, common: dict[str, Any], dense: Any, *, partition: Partition) -> PreTrainedConfig:
        sparse = partition.sparse_layers(dense.num_hidden_layers)
        sliding = architectures.windows(dense)[0]
        return Qwen3MoeConfig(
            **common
            | {
                "head_dim": architectures.head_dim(dense)
            },  # no field of its own in transformers 5, but always published
            intermediate_size=dense.intermediate_size,
            moe_intermediate_size=partition.check_width(dense.intermediate_size),
            num_experts=partition.experts,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[i for i in range(dense.num_hidden_layers) if i not in sparse],
            attention_bias=architectures.biases(dense) == "qkvo",
            use_sliding_window=sliding is not None,
            sliding_window=sliding,
        )

    def layer(self, i: int, sparse: SparseLayer, dense: PreTrainedConfig) -> dict[str, Tensor]:
        return routed(f"model.layers.{i}.mlp", sparse)
