"""Reads one dense FFN after the other, and fits router, scale and weights to the calibration text.

    source = fitting.start(parent, partition, sizes=sizes, ids_BL=ids_BL, importance=importance)
    layer = source.read(i)  # i ascends
    fitted = source.fit(layer, experts_EF, router_ED)

Each layer is read and fitted on what the converted layers below it give. There is a class for each kind of fit: none,
of router and scale, of the weights as well.

Shapes: B windows, L tokens each, T = B x L, D hidden, N neurons, E routed experts, S shared, F neurons per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tasks import layout
from tasks.moe.streamed import Streamed
from tasks.partition import calibration, convert, methods
from tasks.partition.converted import Converted, sum_of_weights
from tasks.partition.layer import CHUNK, Layer, Sizes
from tasks.settings import Partition


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What the experts of one layer are cut from."""

    router_ED: torch.Tensor
    scale: float
    """What the routed experts' weights sum to."""
    gate_ND: torch.Tensor
    """The neurons' weights: in the stored dtype or in float32, which holds every stored one exactly."""
    up_ND: torch.Tensor
    down_DN: torch.Tensor
    change_EFD: torch.Tensor | None = None
    """What each routed expert's down-projection has beyond that of its neurons; None: nothing."""
    error: float | None = None
    """Share of the dense FFN's output energy that is lost on the calibration text; None without text."""


def logits_std(partition: Partition) -> float:
    """`router_std`, or its default."""
    return partition.router_std or (0.02 if partition.elastic else 0.1)


class WithoutText:
    """Nothing is fitted: there is no calibration text."""

    def __init__(self, parent: Streamed, partition: Partition, sizes: Sizes) -> None:
        self._parent, self._partition, self._sizes = parent, partition, sizes

    def read(self, i: int) -> Layer:
        """The FFN of layer `i`: in float32 if the method looks at it, else in the stored dtype."""
        gate_ND, up_ND, down_DN = convert.ffn(self._parent, i)
        if methods.get(self._partition.method).needs != "nothing":
            gate_ND, up_ND, down_DN = gate_ND.float(), up_ND.float(), down_DN.float()
        return Layer(number=i, gate_ND=gate_ND, up_ND=up_ND, down_DN=down_DN)

    def fit(self, layer: Layer, experts_EF: np.ndarray, router_ED: torch.Tensor) -> Fitted:
        """Give logits the standard deviation `router_std` on inputs as RMSNorm leaves them: root mean square 1."""
        norm_D = self._parent.tensor(layout.ffn_norm(layer.number)).float()
        spread = (router_ED.cpu() * norm_D).square().sum(1).mean().sqrt()
        return Fitted(
            router_ED=router_ED * (logits_std(self._partition) / spread.clamp_min(1e-12)),
            scale=sum_of_weights(self._partition, self._sizes.width),
            gate_ND=layer.gate_ND,
            up_ND=layer.up_ND,
            down_DN=layer.down_DN,
        )


class OnText(WithoutText):
    """Router and scale are fitted to calibration text; the weights stay."""

    def __init__(
        self,
        parent: Streamed,
        partition: Partition,
        sizes: Sizes,
        *,
        ids_BL: np.ndarray,
        importance: dict[int, np.ndarray],
        top_k_B: np.ndarray | None = None,
    ) -> None:
        super().__init__(parent, partition, sizes)
        self._importance = importance
        self._top_k_T = None
        if top_k_B is not None:
            self._top_k_T = torch.from_numpy(top_k_B.repeat(ids_BL.shape[1])).to(parent.device)
        self._states = calibration.States(parent, ids_BL)
        self._read = 0  # layers that the hidden states have reached

    def read(self, i: int) -> Layer:
        """The FFN of layer `i` in float32, with what it reads on the calibration text."""
        for below in range(self._read, i):
            self._pass_dense(below)
        self._read = i + 1
        return self._layer(i, self._parent.block(i))

    def _pass_dense(self, i: int) -> None:
        """Move the hidden states through a layer that stays dense."""
        _pass_block(self._states, self._parent.block(i), i)

    def _layer(self, i: int, block: Any) -> Layer:
        layer = Layer(
            number=i,
            gate_ND=block.mlp.gate_proj.weight,
            up_ND=block.mlp.up_proj.weight,
            down_DN=block.mlp.down_proj.weight,
            x_TD=self._states.attend(block, i),
            dtype=self._states.dtype,
            importance_CN=torch.from_numpy(self._importance[i]) if i in self._importance else None,
            top_k_T=self._top_k_T,
        )
        layer.weight_T = layer.relative(self._states.residual_TD)
        return layer

    def fit(self, layer: Layer, experts_EF: np.ndarray, router_ED: torch.Tensor) -> Fitted:
        """Fit the converted FFN, and move the hidden states through it."""
        scale = sum_of_weights(self._partition, self._sizes.width)
        ffn = Converted(layer, experts_EF, sizes=self._sizes, router_ED=router_ED, scale=scale)
        if not (self._sizes.all_active and ffn.is_dense()):  # there a fit would change rounding alone
            self._fit(ffn)
        error = self.advance(layer, ffn)
        return Fitted(
            router_ED=ffn.router_ED,
            scale=ffn.scale,
            gate_ND=ffn.gate_ND,
            up_ND=ffn.up_ND,
            down_DN=ffn.down_DN,
            change_EFD=ffn.change_EFD,
            error=error,
        )

    def advance(self, layer: Layer, ffn: Converted) -> float:
        """Move the hidden states through an FFN in place of the dense one.

        Returns:
            The share of the dense FFN's output energy that it loses.
        """
        lost = total = 0.0
        outputs = (self._states.residual_TD.split(CHUNK), layer.output_TD.split(CHUNK))
        for part, dense_TD, (x_TD, h_TN), top_k in zip(*outputs, layer.chunks(), layer.chosen(), strict=True):
            given_TD = ffn.output(x_TD, h_TN, top_k)
            part += given_TD
            lost += (dense_TD - given_TD).square().sum().item()
            total += dense_TD.square().sum().item()
        return lost / max(total, 1e-30)

    def _fit(self, ffn: Converted) -> None:
        ffn.temper(std=logits_std(self._partition))
        if self._partition.scale == "calibrated":
            ffn.calibrate()


class RefitOnText(OnText):
    """The down-projection is refitted too, and all weights with `fit_passes`, towards the dense model's states."""

    def __init__(self, parent: Streamed, partition: Partition, sizes: Sizes, **text: Any) -> None:
        super().__init__(parent, partition, sizes, **text)
        self._dense = calibration.States(parent, text["ids_BL"])

    def _pass_dense(self, i: int) -> None:
        super()._pass_dense(i)
        _pass_block(self._dense, self._parent.block(i), i)

    def _layer(self, i: int, block: Any) -> Layer:
        layer = super()._layer(i, block)
        x_TD = self._dense.attend(block, i)
        layer.drift_TD = self._dense.residual_TD - self._states.residual_TD
        _add(self._dense, block.mlp, x_TD)
        return layer

    def _fit(self, ffn: Converted) -> None:
        super()._fit(ffn)
        overlap = self._partition.method == "token_clusters"
        if self._partition.fit_passes or not overlap:
            ffn.refit()
        if self._partition.fit_passes:
            ffn.fit(self._partition.fit_passes, seed=self._partition.seed)
        if overlap:
            ffn.refit_experts()


def start(
    parent: Streamed,
    partition: Partition,
    *,
    sizes: Sizes,
    ids_BL: np.ndarray | None,
    importance: dict[int, np.ndarray],
    top_k_B: np.ndarray | None = None,
) -> WithoutText:
    """The fit that the settings ask for.

    Args:
        ids_BL: calibration windows; None if the settings need none.
        importance: of the neurons by layer, for methods that need gradients.
        top_k_B: routed experts that the tokens of each window pass; None: `partition.top_k`.
    """
    if ids_BL is None:
        return WithoutText(parent, partition, sizes)
    kind = RefitOnText if partition.down_proj == "refit" else OnText
    return kind(parent, partition, sizes, ids_BL=ids_BL, importance=importance, top_k_B=top_k_B)


def _pass_block(states: calibration.States, block: Any, i: int) -> None:
    _add(states, block.mlp, states.attend(block, i))


def _add(states: calibration.States, mlp: Any, x_TD: torch.Tensor) -> None:
    with states.products():
        for part, x in zip(states.residual_TD.split(CHUNK), x_TD.split(CHUNK), strict=True):
            part += mlp(x)
