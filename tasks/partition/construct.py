"""The construction: a dense checkpoint becomes a sparse one and its index, layer by layer from the bottom.

Each layer is fitted on what the converted layers below it give. One dense layer, its sparse form and the hidden states
of the calibration text are in memory at once.

Shapes: B windows, L tokens each, D hidden, N neurons, E routed experts, S shared, F neurons per expert.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks import layout, scratch
from tasks.display import Progress
from tasks.moe import device, linear
from tasks.moe import gate as gates
from tasks.moe.gate import Gate
from tasks.moe.streamed import Streamed
from tasks.partition import calibration, convert, exporters, fitting, gradients, identity, index, methods, router_init
from tasks.partition.exporters import SparseLayer
from tasks.partition.fitting import Fitted
from tasks.partition.index import Index
from tasks.partition.layer import Layer, Sizes
from tasks.partition.methods import copy
from tasks.settings import Partition


def construct(
    model_dir: Path,
    corpus_dir: Path,
    partition: Partition,
    *,
    seq_len: int,
    folder: Path,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Write `folder`/moe and `folder`/partition.safetensors, and prove that nothing was lost.

    Args:
        corpus_dir: where calibration windows of `seq_len` tokens are drawn, if the settings need any.
        folder: exists; holds neither result.
        report: called for every layer with how it went.

    Returns:
        identity_error and identity_error_as_written (see identity.Errors), dropped (share of neurons that the method
        leaves out), layer_error per sparse layer where there was text, gates (how well linear routers fit them) and
        seconds per part.

    Raises:
        ValueError: no class can express the result, sizes do not fit, or a tensor is not accounted for.
        IdentityError: the written checkpoint is not its parent, cut up.
    """
    laps: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        laps[name] = round(time.perf_counter() - started - sum(laps.values()), 1)

    parent = Streamed(model_dir, device=device.default())
    exporter = exporters.choose(parent.config, partition)
    sizes = Sizes.of(partition, parent.config.intermediate_size)
    meta: dict[str, Any] = {
        "method": partition.method,
        "seed": partition.seed,
        "source": model_dir.name,
        "source_sha256": scratch.digest(model_dir),
        "settings": partition.model_dump(exclude={"engines"}),  # they shape no byte
        "calibration": [],
    }
    ids_BL = top_k_B = None
    if needs_text(partition):
        count = partition.calibration_windows
        ids_BL, meta["calibration"] = calibration.draw(corpus_dir, seq_len=seq_len, count=count, seed=partition.seed)
        meta["seq_len"] = seq_len
        if partition.elastic:
            top_k_B = calibration.deal(meta["calibration"], partition.elastic)
    lap("reading")

    importance = {} if ids_BL is None else _importance(parent, partition, ids_BL, scratch=folder)
    source = fitting.start(parent, partition, sizes=sizes, ids_BL=ids_BL, importance=importance, top_k_B=top_k_B)
    lap("gradients")

    router = partition.router or ("random" if ids_BL is None else "regression")
    split = methods.get(partition.method).split
    layers: dict[int, np.ndarray] = {}
    scales: dict[int, float] = {}
    errors: dict[str, float] = {}
    made_gates: dict[int, Gate] = {}
    written = convert.moe_writer(parent, folder / "moe", exporter=exporter, partition=partition)
    with written as write, torch.no_grad():
        for i in partition.sparse_layers(parent.layers):
            parent.prefetch(i + 1)
            layer = source.read(i)
            layers[i] = split(layer, sizes, partition)
            router_ED = _first_router(router, layer, layers[i], sizes=sizes, partition=partition)
            fitted = source.fit(layer, layers[i], router_ED)
            scales[i] = float(np.float32(fitted.scale))
            experts = _experts(parent, i, fitted, experts_EF=layers[i], scale=scales[i], partition=partition)
            if partition.gate == "tanh":
                fresh = router == "random"
                made_gates[i] = _tanh_gate(i, experts, fitted, fresh=fresh, sizes=sizes, seed=partition.seed)
            write(i, experts)
            if fitted.error is not None:
                errors[str(i)] = fitted.error
            report("converted" if fitted.error is None else f"{fitted.error:.1%} of the FFN's output lost")

    made = Index(layers=layers, scales=scales, shared_experts=partition.shared_experts, meta=meta)
    if problems := made.problems(sizes.width):
        raise ValueError("; ".join(problems))
    index.write(made, folder / "partition.safetensors")
    gate_fit = None
    if made_gates:
        gates.write(folder / "moe", made_gates)
        if router == "random":  # the gates are fresh then; others choose as the routers do
            gate_fit = linear.refit(folder / "moe", made_gates, ids_BL)
    lap("construction")

    moe = Streamed(folder / "moe", device=parent.device)  # the written checkpoint is judged
    identity_errors = identity.prove(moe, parent, made, identity.sample_ids(parent))
    lap("identity")
    return {
        "identity_error": identity_errors.equal,
        "identity_error_as_written": identity_errors.as_written,
        "dropped": made.dropped(sizes.width),
        "layer_error": errors,
        "gates": gate_fit,
        "seconds": laps,
    }


def needs_text(partition: Partition) -> bool:
    """True if calibration windows are drawn."""
    return (
        methods.get(partition.method).needs in {"activations", "gradients"}
        or partition.router in {"analytical", "regression"}
        or partition.scale == "calibrated"
        or partition.down_proj == "refit"
    )


def _importance(parent: Streamed, partition: Partition, ids_BL: np.ndarray, *, scratch: Path) -> dict[int, np.ndarray]:
    """Importance of the neurons of every sparse layer, for a method that needs gradients; else none."""
    if methods.get(partition.method).needs != "gradients":
        return {}
    with Progress(parent.layers + 1, label="gradients", unit="step") as progress:  # forward, then each layer
        importance, _ = gradients.importance(
            parent,
            ids_BL,
            layers=partition.sparse_layers(parent.layers),
            clusters=partition.experts,
            seed=partition.seed,
            scratch=scratch,
            report=progress.advance,
        )
    return importance


def _first_router(
    name: str, layer: Layer, experts_EF: np.ndarray, *, sizes: Sizes, partition: Partition
) -> torch.Tensor:
    """The router before it is fitted, float32 [E, D]; zero where every token gets every expert."""
    if sizes.all_active:
        return layer.gate_ND.new_zeros(sizes.experts, layer.gate_ND.shape[1]).float()
    router_ED = router_init.start(name, layer, experts_EF[sizes.shared :], seed=partition.seed).float()
    if partition.method == "copy":  # top-k then picks whole copies
        slices = sizes.width // sizes.size
        router_ED = router_ED[copy.router_rows(len(router_ED), slices=slices) * slices]
    return router_ED


def _experts(
    parent: Streamed, i: int, fitted: Fitted, *, experts_EF: np.ndarray, scale: float, partition: Partition
) -> SparseLayer:
    """The layer in the parent's dtypes; copies differ as `noise` and `reinitialise` say."""
    gate, up, down = (parent.stored[name].dtype for name in layout.ffn(i))
    differ = bool(partition.noise or partition.reinitialise)
    experts = convert.slices(
        fitted.gate_ND.to("cpu", gate),
        fitted.up_ND.to("cpu", up),
        fitted.down_DN.cpu(),
        experts_EF,
        shared=partition.shared_experts,
        scale=1.0 if differ else scale,
        router_ED=fitted.router_ED.cpu(),
        down_dtype=down,
    )
    if fitted.change_EFD is not None:
        change_EDF = (fitted.change_EFD * scale).transpose(1, 2).cpu()
        experts = dataclasses.replace(experts, down_EDF=(experts.down_EDF.float() + change_EDF).to(down))
    if not differ:
        return experts
    weights = (experts.gate_EFD, experts.up_EFD, experts.down_EDF)
    gate_EFD, up_EFD, down_EDF = copy.perturbed(*(w.float() for w in weights), options=partition, layer=i)
    return dataclasses.replace(
        experts, gate_EFD=gate_EFD.to(gate), up_EFD=up_EFD.to(up), down_EDF=(down_EDF * scale).to(down)
    )


def _tanh_gate(i: int, experts: SparseLayer, fitted: Fitted, *, fresh: bool, sizes: Sizes, seed: int) -> Gate:
    """The paper's two-layer gate: fresh, or one that chooses as the fitted router does."""
    if not fresh:
        return gates.from_linear(fitted.router_ED.to(experts.gate_EFD.dtype))
    gate = gates.start(*fitted.router_ED.shape, seed=seed, layer=i)
    if sizes.all_active:
        return dataclasses.replace(gate, outer_EE=torch.zeros(sizes.experts, sizes.experts))
    return gate
