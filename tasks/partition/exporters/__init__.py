"""The stock classes that a converted model can be, one file a class; which of them fits a parent and a partition.

    from tasks.partition import exporters
    exporter = exporters.choose(dense_config, partition)
    config = exporter.config(dense_config, partition)

What a class cannot express exactly, it refuses with the reason.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from tasks import architectures
from tasks.engines import limits
from tasks.partition.exporters.base import CLASSES, Exporter, SparseLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tasks.settings import Partition

__all__ = ["EXPORTERS", "Exporter", "SparseLayer", "choose"]

for _file in iter_modules(__path__):
    import_module(f"tasks.partition.exporters.{_file.name}")
EXPORTERS: dict[str, Exporter] = {name: CLASSES[name]() for name in architectures.SPARSE}
"""By model_type, in the order in which `target: auto` tries them. Each file of this folder adds its classes."""


def choose(dense: PreTrainedConfig, partition: Partition) -> Exporter:
    """The exporter that `partition.target` names, or the first that can express the result.

    One whose result all of `partition.engines` load goes before one that does not (see engines.py, which refuses).

    Raises:
        ValueError: none can, or the named one cannot; with every class's reason. Also: sizes that do not fit the FFN,
            or layers that are not there.
    """
    partition.check_width(dense.intermediate_size)
    if not partition.sparse_layers(dense.num_hidden_layers):
        raise ValueError(f"partition.layers = {partition.layers!r} leaves no layer of this model to become sparse")
    reasons = {name: exporter.supports(dense, partition) for name, exporter in EXPORTERS.items()}
    wanted = [partition.target] if partition.target != "auto" else list(EXPORTERS)
    if able := [EXPORTERS[name] for name in wanted if reasons[name] is None]:
        configs = {exporter: exporter.config(dense, partition) for exporter in able}
        loaded = (e for e in able if not any(limits.check(engine, configs[e]) for engine in partition.engines))
        return next(loaded, able[0])
    listed = "".join(f"\n  {name}: {reason or 'can express it'}" for name, reason in reasons.items())
    raise ValueError(
        f"partition.target = {partition.target!r} cannot express this model_type {dense.model_type!r} with "
        f"shared_experts = {partition.shared_experts}, layers = {partition.layers!r}:{listed}"
    )
