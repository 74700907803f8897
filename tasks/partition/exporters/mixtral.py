"""MixtralForCausalLM: no shared experts, no attention biases, one sliding window for all layers or none."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import MixtralConfig, PreTrainedConfig

from tasks import architectures, layout
from tasks.partition.exporters.base import Exporter, SparseLayer
from tasks.settings import Partition


class Mixtral(Exporter):
    row = architectures.MIXTRAL

    def _config(self, common: dict[str, Any], dense: Any, *, partition: Partition) -> PreTrainedConfig:
        return MixtralConfig(
            **common,
            intermediate_size=partition.check_width(dense.intermediate_size),
            num_local_experts=partition.experts,
            head_dim=architectures.head_dim(dense),
            sliding_window=architectures.windows(dense)[0],
        )

    def layer(self, i: int, sparse: SparseLayer, dense: PreTrainedConfig) -> dict[str, Tensor]:
        prefix = f"{layout.block(i)}.block_sparse_moe"
        tensors = {f"{prefix}.gate.weight": sparse.router_ED}
        for e, weights in enumerate(zip(sparse.gate_EFD, sparse.down_EDF, sparse.up_EFD, strict=True)):
            tensors |= {f"{prefix}.experts.{e}.w{n}.weight": weight for n, weight in enumerate(weights, 1)}
        return tensors
