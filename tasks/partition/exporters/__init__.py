"""The stock classes that a converted model can be, one file a class; which of them fits a parent and a partition.

    from tasks.partition import exporters
    exporter = exporters.choose(dense_config, partition)
    config = exporter.config(dense_config, partition)

What a class cannot express exactly, it refuses with the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.partition.exporters.base import Exporter, SparseLayer
from tasks.partition.exporters.granite import GraniteMoe, GraniteMoeShared
from tasks.partition.exporters.mixtral import Mixtral
from tasks.partition.exporters.qwen2_moe import Qwen2Moe
from tasks.partition.exporters.qwen3_moe import Qwen3Moe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tasks.settings import Partition

__all__ = ["EXPORTERS", "Exporter", "SparseLayer", "choose"]

EXPORTERS: dict[str, Exporter] = {
    exporter.name: exporter for exporter in (Mixtral(), GraniteMoeShared(), GraniteMoe(), Qwen2Moe(), Qwen3Moe())
}
"""By model_type, in the order in which `target: auto` tries them."""


def choose(dense: PreTrainedConfig, partition: Partition) -> Exporter:
    """The exporter that `partition.target` names, or the first that can express the result.

    Raises:
        ValueError: none can, or the named one cannot; with every class's reason. Also: sizes that do not fit the FFN,
            or layers that are not there.
    """
    partition.check_width(dense.intermediate_size)
    if not partition.sparse_layers(dense.num_hidden_layers):
        raise ValueError(f"partition.layers = {partition.layers!r} leaves no layer of this model to become sparse")
    reasons = {name: exporter.supports(dense, partition) for name, exporter in EXPORTERS.items()}
    wanted = [partition.target] if partition.target != "auto" else list(EXPORTERS)
    for name in wanted:
        if reasons[name] is None:
            return EXPORTERS[name]
    listed = "".join(f"\n  {name}: {reason or 'can express it'}" for name, reason in reasons.items())
    raise ValueError(
        f"partition.target = {partition.target!r} cannot express this model_type {dense.model_type!r} with "
        f"shared_experts = {partition.shared_experts}, layers = {partition.layers!r}:{listed}"
    )
