"""The pruned baseline by the closed form: a model of the parent's class with fewer neurons in each FFN.

    cut(model_dir, corpus_dir, partition, count=768, seq_len=512, folder=work / "pruned", report=print)

It is the baseline of the converted model, so it gets all that this gets: the same calibration windows, token weights,
drift of the layers below, refit and fit, by the same code (converted.py). It differs in one thing: the neurons are the
same for every token, those with the largest energy on the calibration text.

    no refit    reference of the proof: the parent, less the other neurons
    refit       reference of the proof: the parent with the written neurons in the places of the kept ones, less the
                others

Shapes: T tokens, D hidden, N neurons of the parent's FFN, M kept ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from tasks import layout
from tasks.moe import device, families, files
from tasks.moe.streamed import Streamed
from tasks.moe.writer import ShardWriter
from tasks.partition import calibration, convert, exporters, fitting, identity, positions
from tasks.partition.converted import Converted
from tasks.partition.identity import IdentityError
from tasks.partition.layer import Layer, Sizes
from tasks.settings import Partition

TOLERANCE = 1e-5
"""Of the largest logit. The numbers that are compared are the same, in whatever dtype they are stored."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is left of one FFN, float32."""

    neurons_M: Tensor
    """int64, ascending."""
    gate_MD: Tensor
    up_MD: Tensor
    down_DM: Tensor
    converted: Converted
    """The parent's FFN with the other neurons multiplied by 0."""


def keep(layer: Layer, count: int, *, refit: bool, fit_passes: int, seed: int) -> Kept:
    """Keep the `count` neurons that contribute most on the calibration tokens, the first among equals.

    Args:
        layer: with calibration tokens.
        count: 1 to the layer's width.
        refit, fit_passes, seed: as in settings.Partition.
    """
    width = len(layer.energy_N)
    order_N = layer.energy_N.argsort(descending=True, stable=True)
    size = math.gcd(count, width)
    # The kept ones are shared experts, the others routed experts that no token chooses.
    sizes = Sizes(width=width, experts=(width - count) // size, shared=count // size, size=size, top_k=0)
    experts_EF = order_N.reshape(-1, size).cpu().numpy().astype(np.int32)
    router_ED = layer.gate_ND.new_zeros(sizes.experts, layer.gate_ND.shape[1])
    ffn = Converted(layer, experts_EF, sizes=sizes, router_ED=router_ED, scale=0.0)
    if refit:
        ffn.refit()
    if fit_passes:
        ffn.fit(fit_passes, seed=seed)
    neurons_M = order_N[:count].sort().values
    return Kept(
        neurons_M=neurons_M,
        gate_MD=ffn.gate_ND[neurons_M],
        up_MD=ffn.up_ND[neurons_M],
        down_DM=ffn.down_DN[:, neurons_M].contiguous(),
        converted=ffn,
    )


@torch.no_grad()
def cut(
    model_dir: Path,
    corpus_dir: Path,
    partition: Partition,
    *,
    count: int,
    seq_len: int,
    folder: Path,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Write the pruned baseline of a parent and a partition, a plain checkpoint with tokenizer, and prove what it is.

    Args:
        corpus_dir: where the calibration windows of `seq_len` tokens are drawn.
        count: neurons of each FFN.
        folder: the checkpoint; created here.
        report: called for every layer with how it went.

    Returns:
        ffn_width, parent_ffn_width, layer_error (share of each FFN's output energy that is lost on the calibration
        text), identity_error.

    Raises:
        ValueError: the conversion itself is refused, or a tensor is not accounted for.
        IdentityError: the written checkpoint is not what was cut. It is left for whoever looks for the reason.
    """
    parent = Streamed(model_dir, device=device.default())
    exporters.choose(parent.config, partition)  # what cannot be converted has no baseline
    width: int = parent.config.intermediate_size
    ids_BL, _ = calibration.draw(corpus_dir, seq_len=seq_len, count=partition.calibration_windows, seed=partition.seed)
    kind = fitting.RefitOnText if partition.down_proj == "refit" else fitting.OnText
    source = kind(parent, partition, Sizes.of(partition, width), ids_BL=ids_BL, importance={})
    config = parent_config(parent)
    config.intermediate_size = count
    plan = {name: (parent.stored[name].dtype, shape) for name, shape in families.expected(config).items()}
    kept: dict[int, np.ndarray] = {}
    errors: dict[str, float] = {}
    folder.mkdir()
    with ShardWriter(folder, plan) as writer:
        cut_names = {name for i in range(parent.layers) for name in layout.ffn(i)}
        for name in plan:
            if name not in cut_names:
                writer.write(name, parent.tensor(name))
        for i in range(parent.layers):
            parent.prefetch(i + 1)
            layer = source.read(i)
            made = keep(
                layer,
                count,
                refit=partition.down_proj == "refit",
                fit_passes=partition.fit_passes,
                seed=partition.seed,
            )
            kept[i] = made.neurons_M.cpu().numpy()
            for name, weight in zip(layout.ffn(i), (made.gate_MD, made.up_MD, made.down_DM), strict=True):
                writer.write(name, weight.to(plan[name][0]))
            errors[str(i)] = source.advance(layer, made.converted)
            report(f"{errors[str(i)]:.1%} of the FFN's output lost")
    files.write_config(config, folder)
    files.copy_tokenizer(parent.folder, folder)
    files.copy_documents(parent.folder, folder)
    error = prove(Streamed(folder, device=parent.device), parent, kept, parent_weights=partition.down_proj == "keep")
    return {"ffn_width": count, "parent_ffn_width": width, "layer_error": errors, "identity_error": error}


def parent_config(parent: Streamed) -> Any:
    """A parent's config object, to be altered. Raises ValueError if the parent has other tensors than its class."""
    config, altered = (
        AutoConfig.from_pretrained(parent.folder, local_files_only=True, trust_remote_code=False) for _ in range(2)
    )
    try:
        families.account({name: entry.shape for name, entry in parent.stored.items()}, families.expected(config))
    except ValueError as error:
        raise ValueError(f"{parent.folder} {error}") from None
    return altered


def require_equal(own: Tensor, expected: Tensor, *, reference: str) -> float:
    """The largest difference of a pruned model's logits over the largest one of its reference.

    Raises:
        IdentityError: it is above TOLERANCE.
    """
    largest = expected.abs().max().item()
    error = (own - expected).abs().max().item() / largest if largest else math.inf
    if not error <= TOLERANCE:  # a NaN too
        raise IdentityError(
            f"pruned model: its logits differ from those of {reference} by {error:.2e} of the largest; allowed: "
            f"{TOLERANCE:.0e}"
        )
    return error


@torch.no_grad()
def prove(pruned: Streamed, parent: Streamed, kept: Mapping[int, np.ndarray], *, parent_weights: bool) -> float:
    """Prove that a pruned model is its parent without the neurons that are not kept.

    Args:
        kept: int64 [M] of every layer, the neuron of the parent at each place of the pruned model.
        parent_weights: the reference's neurons have the parent's weights, or else those of the pruned model.

    Returns:
        The largest difference of logits over the largest logit of the reference, FFNs in float64.

    Raises:
        IdentityError: it is above TOLERANCE, or the two place their tokens differently.
    """
    if wrong := positions.difference(pruned, parent):
        raise IdentityError(f"pruned model: {wrong}")

    def widen(_layer: int, block: nn.Module) -> None:
        identity.widen(block)

    def reference(layer: int, block: Any) -> None:
        identity.widen(block)
        gate_ND, up_ND, down_DN = (
            getattr(block.mlp, name).weight.data for name in ("gate_proj", "up_proj", "down_proj")
        )
        place_M = torch.from_numpy(kept[layer]).to(down_DN.device)
        down_DM = down_DN[:, place_M]
        down_DN.zero_()
        if not parent_weights:
            gate_MD, up_MD, down_DM = (weight.to(down_DN) for weight in convert.ffn(pruned, layer))
            gate_ND[place_M], up_ND[place_M] = gate_MD, up_MD
        down_DN[:, place_M] = down_DM

    ids = torch.from_numpy(identity.sample_ids(parent))
    expected = parent.logits(parent.forward(ids, blocks=reference))
    own = pruned.logits(pruned.forward(ids, blocks=widen))
    return require_equal(own, expected, reference="the parent without the other neurons")
