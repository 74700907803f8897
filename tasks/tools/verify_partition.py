"""Hold a checkpoint of the partition stage against its index and its dense parent, as they lie on disk.

In this order: the index keeps its method's constraints; the config is the one that index and parent give; every tensor
outside the sparse FFNs is bit for bit the parent's; so are the gate and up rows of every expert, shared ones too; the
down columns are the parent's times the scale, rounded once, unless they were refitted; perturbed copies are those that
the seed gives; and with all experts on the logits are the dense model's (tasks/partition/identity.py). One layer of
each is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tasks import layout
from tasks.moe import files
from tasks.moe.streamed import Streamed
from tasks.partition import convert, exporters, identity
from tasks.partition import index as index_file
from tasks.partition.exporters import Exporter
from tasks.partition.index import Index
from tasks.partition.methods import copy

_UNREAD = ("transformers_version",)


def verify_checkpoint(moe_dir: Path, index_path: Path, dense_dir: Path) -> list[str]:
    """What is wrong with a checkpoint, each problem naming the file; empty if it is its parent, cut up.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not readable, or a layer does not hold the tensors of its
            class.
    """
    index = index_file.read(index_path)
    moe, dense = Streamed(moe_dir), Streamed(dense_dir)
    problems = [f"{index_path}: {text}" for text in _index(dense, index)]
    if problems:
        return problems
    options = index.options.model_copy(update={"target": moe.config.model_type})
    exporter = exporters.choose(dense.config, options)
    problems = [f"{moe_dir / 'config.json'}: {text}" for text in _config(moe, dense, index, exporter=exporter)]
    if problems:
        return problems
    problems = [f"{moe_dir}: {text}" for text in _carried(moe, dense, index, exporter=exporter)]
    for layer in index.layers:
        problems += [f"{moe_dir}: layer {layer}: {text}" for text in _rows(moe, dense, index, layer=layer)]
    try:
        identity.prove(moe, dense, index, identity.sample_ids(dense))
    except identity.IdentityError as failed:
        problems.append(f"{moe_dir}: {failed}")
    return problems


def _index(dense: Streamed, index: Index) -> list[str]:
    """What is wrong with the index for this parent."""
    problems = index.problems(dense.config.intermediate_size)
    if not problems and sorted(index.layers) != (wanted := index.options.sparse_layers(dense.layers)):
        problems = [f"it holds the layers {sorted(index.layers)}; by its settings {wanted} become sparse"]
    return problems


def _config(moe: Streamed, dense: Streamed, index: Index, *, exporter: Exporter) -> Iterator[str]:
    """Fields of the config that are not what the partition writes."""
    written = json.loads((moe.folder / "config.json").read_text())
    config = exporter.config(dense.config, index.options.model_copy(update={"target": exporter.name}))
    wanted = json.loads(json.dumps(files.config_fields(config)))
    for name in sorted(set(written) | set(wanted)):
        if name not in _UNREAD and written.get(name) != wanted.get(name):
            yield f"{name} = {written.get(name)!r}; by the index and its parent it is {wanted.get(name)!r}"


def _carried(moe: Streamed, dense: Streamed, index: Index, *, exporter: Exporter) -> Iterator[str]:
    """Tensors outside the sparse FFNs that are absent, not the parent's, or of no known origin."""
    cut = {name for i in index.layers for name in layout.ffn(i)}
    carried = exporter.carried(dense.config, [name for name in dense.stored if name not in cut])
    for source, name in carried.items():
        if name not in moe.stored:
            yield f"{name} is not there; it is the parent's {source}"
        elif not _same(moe.tensor(name), dense.tensor(source)):
            yield f"{name} is not bit for bit the parent's {source}"
    known = set(carried.values())
    for layer in range(dense.layers):
        for name, value in exporter.extra(layer, dense.config, dtype=torch.float32).items():
            known.add(name)
            if not torch.equal(moe.tensor(name).float(), value):
                yield f"{name}, which the parent has not, would alter it"
    cut_layers = tuple(
        f"{layout.block(i)}." for i in index.layers
    )  # their names are held against the class on loading
    if strays := sorted(name for name in set(moe.stored) - known if not name.startswith(cut_layers)):
        yield f"{', '.join(strays[:5])}: of no known origin"


def _same(given: Tensor, wanted: Tensor) -> bool:
    """Equal dtype, shape and bits, so that a NaN equals itself."""
    same = given.dtype == wanted.dtype and given.shape == wanted.shape
    return same and torch.equal(given.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))


def _rows(moe: Streamed, dense: Streamed, index: Index, *, layer: int) -> Iterator[str]:
    """Experts whose weights are not what index, scale and settings make of the parent's."""
    parts = identity.ffn(moe.block(layer), index)
    if any(bool(tensor.any()) for tensor in parts.zeros):
        yield "the gate, or an idle neuron, of its shared expert is not zero"
    options, shared = index.options, index.shared_experts
    gate, up, down = parts.side_by_side(index.scales[layer])
    given = {"gate": gate, "up": up, "down": down.T}
    for name, (wanted_EFD, slack_EFD) in _wanted(dense, index, layer=layer).items():
        if options.fit_passes or (name == "down" and options.down_proj == "refit"):
            continue
        near_EFD = (given[name].view_as(wanted_EFD) - wanted_EFD).abs() <= slack_EFD
        wrong = (~near_EFD).flatten(1).any(1).nonzero().flatten().tolist()
        rows = "down columns" if name == "down" else f"{name} rows"
        for kind, numbers in (
            ("shared experts", [e for e in wrong if e < shared]),
            ("experts", [e - shared for e in wrong if e >= shared]),
        ):
            if numbers:
                yield f"{rows} of {kind} {numbers[:5]} are not what the index and the settings make of the parent's"


def _wanted(dense: Streamed, index: Index, *, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of gate, up and down by expert, float32 [S + E, F, D], the scale taken off; and how far off one may be.

    Moved rows are exact. The scale may be off by one rounding, and perturbed copies by that of a mean over the matrix.
    """
    stored = dict(zip(("gate", "up", "down"), convert.ffn(dense, layer), strict=True))
    place_EF = torch.from_numpy(index.layers[layer])
    rows = {name: (w.T if name == "down" else w).float()[place_EF] for name, w in stored.items()}
    options, scale = index.options, index.scales[layer]
    perturbed = bool(options.noise or options.reinitialise)
    if perturbed:
        copy.perturbed(rows["gate"], rows["up"], rows["down"].mT, options=options, layer=layer)
    wanted = {}
    for name, row_EFD in rows.items():
        factor = torch.ones(len(row_EFD), 1, 1)
        if name == "down":
            factor[index.shared_experts :] = scale
        dtype = stored[name].dtype
        row_EFD = (row_EFD * factor).to(dtype).float() / factor
        slack_EFD = torch.zeros_like(row_EFD)
        if perturbed or name == "down":
            slack_EFD = row_EFD.abs() * (2 * torch.finfo(dtype).eps)
        if perturbed:
            slack_EFD += row_EFD.abs().max() * (4 * torch.finfo(torch.float32).eps)
        wanted[name] = row_EFD, slack_EFD
    return wanted
