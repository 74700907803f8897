"""The construction itself: a dense checkpoint becomes a sparse one and its index, layer by layer from the bottom.

Each layer is fitted on what the already converted layers below hand it. One dense layer, its sparse form and the
hidden states of the calibration text are in memory at once.

Shapes: B windows, L tokens each, T = B x L, D hidden, N neurons, E routed experts, S shared, F neurons per expert.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks import scratch
from tasks.display import Progress
from tasks.moe import gate as gates
from tasks.moe import linear
from tasks.moe.gate import Gate
from tasks.moe.streamed import Streamed
from tasks.partition import calibration, convert, exporters, gradients, identity, index, methods, router_init
from tasks.partition.converted import Converted, sum_of_weights
from tasks.partition.exporters import SparseLayer
from tasks.partition.index import Index
from tasks.partition.layer import CHUNK, Layer, Sizes
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
        model_dir: the dense parent.
        corpus_dir: where calibration windows of `seq_len` tokens are drawn, if the settings need any.
        partition: the settings.
        seq_len: tokens per window.
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

    parent = Streamed(model_dir, device="cuda" if torch.cuda.is_available() else "cpu")
    exporter = exporters.choose(parent.config, partition)
    meta: dict[str, Any] = {
        "method": partition.method,
        "seed": partition.seed,
        "source": model_dir.name,
        "source_sha256": scratch.digest(model_dir),
        "settings": partition.model_dump(),
        "calibration": [],
    }
    ids_BL = None
    if needs_text(partition):
        count = partition.calibration_windows
        ids_BL, meta["calibration"] = calibration.draw(corpus_dir, seq_len=seq_len, count=count, seed=partition.seed)
        meta["seq_len"] = seq_len
    lap("reading")
    builder = Builder(parent, partition, ids_BL, folder=folder, report=report)
    lap("gradients")
    convert.convert(parent, folder / "moe", exporter=exporter, partition=partition, layer=builder.layer)
    made = Index(layers=builder.layers, scales=builder.scales, shared_experts=partition.shared_experts, meta=meta)
    if problems := made.problems(parent.config.intermediate_size):
        raise ValueError("; ".join(problems))
    index.write(made, folder / "partition.safetensors")
    fitted = None
    if builder.gates:
        gates.write(folder / "moe", builder.gates)
        if builder.router == "random":  # and the gates are fresh; others choose as the routers do
            fitted = linear.refit(folder / "moe", builder.gates, ids_BL)
    lap("construction")
    moe = Streamed(folder / "moe", device=parent.device)  # what was written is what is judged
    found = identity.prove(moe, parent, made, identity.sample_ids(parent))
    lap("identity")
    return {
        "identity_error": found.equal,
        "identity_error_as_written": found.as_written,
        "dropped": made.dropped(parent.config.intermediate_size),
        "layer_error": builder.errors,
        "gates": fitted,
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


class Builder:
    """Makes one sparse layer after the other, and keeps what the index file needs."""

    def __init__(
        self,
        parent: Streamed,
        partition: Partition,
        ids_BL: np.ndarray | None,
        *,
        folder: Path,
        report: Callable[[str], None],
    ) -> None:
        self._parent, self._partition, self._report = parent, partition, report
        width = parent.config.intermediate_size
        self._sizes = Sizes(
            width=width,
            experts=partition.experts,
            shared=partition.shared_experts,
            size=partition.check_width(width),
            top_k=partition.top_k,
        )
        self._all = partition.top_k == partition.experts  # nothing to choose: the weights are to be equal
        self.router = partition.router or ("random" if ids_BL is None else "regression")
        self._method = methods.get(partition.method)
        self._importance: dict[int, np.ndarray] = {}
        if self._method.needs == "gradients" and ids_BL is not None:
            with Progress(
                parent.layers + 1, label="gradients", unit="step"
            ) as progress:  # a forward pass, then layer by layer
                self._importance, _ = gradients.importance(
                    parent,
                    ids_BL,
                    layers=partition.sparse_layers(parent.layers),
                    clusters=partition.experts,
                    seed=partition.seed,
                    scratch=folder,
                    report=progress.advance,
                )
        self._states = None if ids_BL is None else calibration.States(parent, ids_BL)
        self._dense: calibration.States | None = None
        if ids_BL is not None and partition.down_proj == "refit":
            self._dense = calibration.States(parent, ids_BL)  # of the parent, which a refit follows
        self._passed = 0  # layers that the hidden states have passed
        self.layers: dict[int, np.ndarray] = {}
        self.scales: dict[int, float] = {}
        self.gates: dict[int, Gate] = {}
        self.errors: dict[str, float] = {}

    @torch.no_grad()
    def layer(self, i: int) -> SparseLayer:
        """Layer `i`, which lies above all that were made before."""
        partition, stored = self._partition, convert.ffn(self._parent, i)
        for below in range(self._passed, i):
            self._pass_dense(below)
        self._passed = i + 1
        scale, down_DN, text = sum_of_weights(partition, self._sizes.width), None, "converted"
        if self._states is None:
            weights = stored if self._method.needs == "nothing" else tuple(weight.float() for weight in stored)
            layer = Layer(number=i, gate_ND=weights[0], up_ND=weights[1], down_DN=weights[2])
            experts_EF = self._method.split(layer, self._sizes, partition)
            router_ED = self._sized_without_text(i, self._start_router(layer, experts_EF))
        else:
            layer = self._read(self._states, i)
            experts_EF = self._method.split(layer, self._sizes, partition)
            ffn = Converted(
                layer, experts_EF, sizes=self._sizes, router_ED=self._start_router(layer, experts_EF), scale=scale
            )
            self._fit(ffn, refit=layer.drift_TD is not None)
            self.errors[str(i)] = _advance(self._states, layer, ffn)
            router_ED, scale, text = ffn.router_ED, ffn.scale, f"{self.errors[str(i)]:.1%} of the FFN's output lost"
            if layer.drift_TD is not None:
                down_DN = ffn.down_DN
            if partition.fit_passes:
                stored = (ffn.gate_ND.to(stored[0]), ffn.up_ND.to(stored[1]), stored[2])
        self.layers[i], self.scales[i] = experts_EF, float(np.float32(scale))
        if partition.gate == "tanh":
            fresh = gates.start(*router_ED.shape, seed=partition.seed, layer=i)
            if self._all:
                fresh = dataclasses.replace(fresh, outer_EE=torch.zeros(len(router_ED), len(router_ED)))
            linear_gate = gates.from_linear(router_ED.to(stored[0].dtype))
            self.gates[i] = fresh if self.router == "random" else linear_gate
        self._report(text)
        place_P = torch.from_numpy(experts_EF.reshape(-1)).long()
        return self._sparse(
            i, stored, router_ED=router_ED, refit_DP=None if down_DN is None else down_DN.cpu()[:, place_P]
        )

    def _read(self, states: calibration.States, i: int) -> Layer:
        """The FFN of layer `i` in float32 with what it reads, and for a refit how far that is from the parent's."""
        block: Any = self._parent.block(i)
        importance = torch.from_numpy(self._importance[i]) if i in self._importance else None
        layer = Layer(
            number=i,
            gate_ND=block.mlp.gate_proj.weight,
            up_ND=block.mlp.up_proj.weight,
            down_DN=block.mlp.down_proj.weight,
            x_TD=states.attend(block, i),
            importance_CN=importance,
        )
        layer.weight_T = layer.relative(states.residual_TD)
        if self._dense is not None:
            x_TD = self._dense.attend(block, i)
            layer.drift_TD = self._dense.residual_TD - states.residual_TD
            _add(self._dense, block.mlp, x_TD)
        return layer

    def _pass_dense(self, i: int) -> None:
        """Move the hidden states through a layer that stays dense."""
        for states in (self._states, self._dense):
            if states is not None:
                block: Any = self._parent.block(i)
                _add(states, block.mlp, states.attend(block, i))

    def _start_router(self, layer: Layer, experts_EF: np.ndarray) -> torch.Tensor:
        if self._all:
            return layer.gate_ND.new_zeros(self._sizes.experts, layer.gate_ND.shape[1]).float()
        routed_EF = experts_EF[self._sizes.shared :]
        router_ED = router_init.start(self.router, layer, routed_EF, seed=self._partition.seed).float()
        if self._partition.method == "copy":  # top-k then picks whole copies
            slices = self._sizes.width // self._sizes.size
            router_ED = router_ED[copy.router_rows(len(router_ED), slices=slices) * slices]
        return router_ED

    def _sized_without_text(self, i: int, router_ED: torch.Tensor) -> torch.Tensor:
        """Logits of the standard deviation `router_std` for inputs as RMSNorm leaves them: root mean square 1."""
        norm_D = self._parent.tensor(f"model.layers.{i}.post_attention_layernorm.weight").float()
        spread = (router_ED.cpu() * norm_D).square().sum(1).mean().sqrt()
        return router_ED * (self._partition.router_std / spread.clamp_min(1e-12))

    def _fit(self, ffn: Converted, *, refit: bool) -> None:
        if self._all and ffn.is_dense():
            return  # what a fit would change is rounding
        ffn.temper(std=self._partition.router_std)
        if self._partition.scale == "calibrated":
            ffn.calibrate()
        if refit:
            ffn.refit()
        if refit and self._partition.fit_passes:
            ffn.fit(self._partition.fit_passes, seed=self._partition.seed)

    def _sparse(
        self,
        i: int,
        stored: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        *,
        router_ED: torch.Tensor,
        refit_DP: torch.Tensor | None,
    ) -> SparseLayer:
        """The layer in the parent's dtypes; copies differ as `noise` and `reinitialise` say."""
        partition, scale = self._partition, self.scales[i]
        differ = bool(partition.noise or partition.reinitialise)
        made = convert.slices(
            *stored,
            self.layers[i],
            shared=self._sizes.shared,
            scale=1.0 if differ else scale,
            router_ED=router_ED.cpu(),
            refit_DP=refit_DP,
        )
        if not differ:
            return made
        weights = (made.gate_EFD, made.up_EFD, made.down_EDF)
        gate_EFD, up_EFD, down_EDF = copy.perturbed(*(w.float() for w in weights), options=partition, layer=i)
        return dataclasses.replace(
            made,
            gate_EFD=gate_EFD.to(weights[0]),
            up_EFD=up_EFD.to(weights[1]),
            down_EDF=(down_EDF * scale).to(weights[2]),
        )


def _add(states: calibration.States, mlp: Any, x_TD: torch.Tensor) -> None:
    for part, x in zip(states.residual_TD.split(CHUNK), x_TD.split(CHUNK), strict=True):
        part += mlp(x)


def _advance(states: calibration.States, layer: Layer, ffn: Converted) -> float:
    """Add the converted FFN's output to the hidden states; the share of the dense one's energy that is lost."""
    lost = total = 0.0
    for part, (x_TD, h_TN) in zip(states.residual_TD.split(CHUNK), layer.chunks(), strict=True):
        dense_TD, sparse_TD = h_TN @ layer.down_DN.T, ffn.output(x_TD, h_TN)
        part += sparse_TD
        lost += (dense_TD - sparse_TD).square().sum().item()
        total += dense_TD.square().sum().item()
    return lost / max(total, 1e-30)
