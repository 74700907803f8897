"""GraniteMoeForCausalLM and GraniteMoeSharedForCausalLM: attention biases, full attention, all layers sparse.

Their four multipliers are set to what the dense families have. A head_dim other than hidden / heads is stored as a
field of its own, which transformers reads and other engines may not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GraniteMoeConfig, GraniteMoeSharedConfig, PreTrainedConfig

from tasks import architectures, layout
from tasks.partition.exporters.base import Exporter, SparseLayer, odd_head_dim
from tasks.settings import Partition


class GraniteMoe(Exporter):
    row = architectures.GRANITE_MOE

    def _config(self, common: dict[str, Any], dense: Any, *, partition: Partition) -> PreTrainedConfig:
        return GraniteMoeConfig(**self._granite(common, dense, partition=partition))

    def _granite(self, common: dict[str, Any], dense: Any, *, partition: Partition) -> dict[str, Any]:
        return (
            common
            | odd_head_dim(dense)
            | {
                "intermediate_size": partition.check_width(dense.intermediate_size),
                "num_local_experts": partition.experts,
                "attention_bias": architectures.biases(dense) != "",
            }
            | architectures.multipliers(dense)
        )

    def layer(self, i: int, sparse: SparseLayer, dense: PreTrainedConfig) -> dict[str, Tensor]:
        prefix = f"{layout.block(i)}.block_sparse_moe"
        return {
            f"{prefix}.router.layer.weight": sparse.router_ED,
            f"{prefix}.input_linear.weight": torch.cat([sparse.gate_EFD, sparse.up_EFD], dim=1),
            f"{prefix}.output_linear.weight": sparse.down_EDF,
        }


class GraniteMoeShared(GraniteMoe):
    row = architectures.GRANITE_MOE_SHARED

    def _config(self, common: dict[str, Any], dense: Any, *, partition: Partition) -> PreTrainedConfig:
        fields = self._granite(common, dense, partition=partition)
        shared = partition.shared_experts * fields["intermediate_size"]
        return GraniteMoeSharedConfig(**fields, shared_intermediate_size=shared)

    def layer(self, i: int, sparse: SparseLayer, dense: PreTrainedConfig) -> dict[str, Tensor]:
        assert sparse.shared is not None
        gate, up, down = sparse.shared
        prefix = f"{layout.block(i)}.shared_mlp"
        return super().layer(i, sparse, dense) | {
            f"{prefix}.input_linear.weight": torch.cat([gate, up]),
            f"{prefix}.output_linear.weight": down,
        }
