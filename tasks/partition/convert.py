"""From a dense checkpoint folder to a sparse one, tensor by tensor, with every tensor of the parent accounted for.

    with moe_writer(parent, folder, exporter=exporter, partition=partition) as write:
        for i in partition.sparse_layers(parent.layers):
            write(i, slices(*ffn(parent, i), experts_EF, shared=0, scale=4.0))

Shapes: D hidden, N neurons (FFN width), S shared experts, E routed experts, F neurons per expert, M = S * F.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tasks import layout
from tasks.moe import files
from tasks.moe.streamed import Stored, Streamed
from tasks.moe.writer import ShardWriter
from tasks.partition.exporters import Exporter, SparseLayer
from tasks.settings import Partition

_ROWS = 16  # of down_proj at once: their float32 copies stay in the processor's cache


def ffn(parent: Streamed, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """gate_ND, up_ND and down_DN of a dense layer in the stored dtype."""
    gate, up, down = (parent.tensor(name) for name in layout.ffn(i))
    return gate, up, down


def slices(
    gate_ND: Tensor,
    up_ND: Tensor,
    down_DN: Tensor,
    experts_EF: np.ndarray,
    *,
    shared: int,
    scale: float,
    router_ED: Tensor | None = None,
    down_dtype: torch.dtype | None = None,
) -> SparseLayer:
    """Cut a dense FFN into experts; each weight keeps its dtype.

    Args:
        experts_EF: int [S + E, F], the neuron at every place, shared experts first.
        scale: what the routed weights are to sum to; folded into the routed experts' down-projection in float32, then
            rounded.
        router_ED: zeros if absent.
        down_dtype: of the experts' down-projection; that of down_DN if absent.
    """
    places_P = torch.from_numpy(np.ascontiguousarray(experts_EF, dtype=np.int64)).reshape(-1)
    size, hidden = experts_EF.shape[1], gate_ND.shape[1]
    experts, cut = len(experts_EF) - shared, shared * size
    neurons_M, routed_P = places_P[:cut], places_P[cut:]
    down_dtype = down_dtype or down_DN.dtype
    down_EDF = torch.empty(experts, hidden, size, dtype=down_dtype)
    for row in range(0, hidden, _ROWS):
        block_RP = down_DN[row : row + _ROWS].float().index_select(1, routed_P).mul_(scale)
        down_EDF[:, row : row + _ROWS] = block_RP.view(-1, experts, size).permute(1, 0, 2)
    return SparseLayer(
        router_ED=gate_ND.new_zeros(experts, hidden) if router_ED is None else router_ED.to(gate_ND),
        gate_EFD=gate_ND[routed_P].view(experts, size, hidden),
        up_EFD=up_ND[routed_P].view(experts, size, hidden),
        down_EDF=down_EDF,
        shared_gate_MD=gate_ND[neurons_M] if shared else None,
        shared_up_MD=up_ND[neurons_M] if shared else None,
        shared_down_DM=down_DN[:, neurons_M].to(down_dtype) if shared else None,
    )


@contextmanager
def moe_writer(
    parent: Streamed, folder: Path, *, exporter: Exporter, partition: Partition, shard_bytes: int = 2_000_000_000
) -> Iterator[Callable[[int, SparseLayer], None]]:
    """Write the sparse checkpoint into a new folder: all that is carried over, then each sparse layer as it is given.

    Args:
        parent: the dense checkpoint; its tokenizer, generation config, model card and licence are copied.
        folder: created here.

    Yields:
        A function that writes one sparse layer, by its number; to be called once for each, in any order.

    Raises:
        ValueError: the class cannot express the result; a tensor of the parent has no place in it, or two; one is
            missing; or a layer is missing, or not of the planned shape.
    """
    config = exporter.config(parent.config, partition)
    plan, carried = _plan(parent, exporter, partition=partition)
    on_disk = parent.names.on_disk
    plan = {on_disk(name): entry for name, entry in plan.items()}
    plan |= {name: (entry.dtype, entry.shape) for name, entry in parent.outside.items()}
    folder.mkdir()
    with ShardWriter(folder, plan, shard_bytes=shard_bytes) as writer:
        for name in parent.outside:
            writer.write(name, parent.outside_tensor(name))
        for name, origin in carried.items():
            writer.write(on_disk(name), parent.tensor(origin) if isinstance(origin, str) else origin)

        def write(i: int, layer: SparseLayer) -> None:
            for name, tensor in exporter.layer(i, layer, parent.config).items():
                writer.write(on_disk(name), tensor)

        yield write
    files.write_config(config, folder)
    if key := parent.names.config:  # the larger model's config stays; its text tower is another
        whole = files.read_json(parent.folder / "config.json")
        whole[key] = files.read_json(folder / "config.json")
        (folder / "config.json").write_text(json.dumps(whole, indent=2) + "\n")
    files.copy_tokenizer(parent.folder, folder)
    files.copy_documents(parent.folder, folder)


def _plan(
    parent: Streamed, exporter: Exporter, *, partition: Partition
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], dict[str, str | Tensor]]:
    """Dtype and shape of every tensor of the result, and those that no sparse layer gives.

    The latter are the names of the parent's tensors, or new ones.
    """
    dense: Any = parent.config
    sparse = {layout.ffn(i)[0]: i for i in partition.sparse_layers(parent.layers)}
    cut = {name for i in sparse.values() for name in layout.ffn(i)}
    with torch.device("meta"):
        known = list(AutoModelForCausalLM.from_config(dense).state_dict())
    absent = [name for name in known if name not in parent.stored]
    if missing := [name for name in absent if not (name == layout.HEAD and dense.tie_word_embeddings)]:
        raise ValueError(f"{parent.folder}: tensors of a {dense.model_type} are missing: {missing}")
    moved = exporter.carried(dense, [name for name in parent.stored if name not in cut])
    if homeless := sorted(set(parent.stored) - cut - set(moved)):
        raise ValueError(
            f"{parent.folder}: a {exporter.name} of this config.json has no place for these tensors: {homeless}"
        )
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    carried: dict[str, str | Tensor] = {}
    twice: list[str] = []

    def add(tensors: Mapping[str, Tensor | Stored]) -> None:
        twice.extend(set(plan) & set(tensors))
        plan.update({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})

    for name in known:
        if name in sparse:
            add(exporter.layer(sparse[name], _meta_layer(parent, sparse[name], partition=partition), dense))
        elif name in moved:
            add({moved[name]: parent.stored[name]})
            carried[moved[name]] = name
    for i in range(parent.layers):
        extra = exporter.extra(i, dense, dtype=parent.stored[layout.part(i, "self_attn.o_proj")].dtype)
        add(extra)
        carried |= extra
    if twice:
        raise ValueError(f"{parent.folder}: in a {exporter.name} two tensors would have one name: {sorted(twice)}")
    return plan, carried


def _meta_layer(parent: Streamed, i: int, *, partition: Partition) -> SparseLayer:
    """Dtypes and shapes of what layer `i` becomes."""
    gate, up, down = (parent.stored[name] for name in layout.ffn(i))
    width, hidden = gate.shape
    size, experts = partition.check_width(width), partition.experts
    shared = partition.shared_experts * size

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return SparseLayer(
        router_ED=empty(gate.dtype, experts, hidden),
        gate_EFD=empty(gate.dtype, experts, size, hidden),
        up_EFD=empty(up.dtype, experts, size, hidden),
        down_EDF=empty(down.dtype, experts, hidden, size),
        shared_gate_MD=empty(gate.dtype, shared, hidden) if shared else None,
        shared_up_MD=empty(up.dtype, shared, hidden) if shared else None,
        shared_down_DM=empty(down.dtype, hidden, shared) if shared else None,
    )
