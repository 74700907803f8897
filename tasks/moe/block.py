"""MoE blocks that training uses in place of the stock class's, by kind: the core's gate, and those of plug-ins.

A kind is a module with the functions of `Kind`; a plug-in's is its `block.py`. What its blocks have beyond the stock
class is stored beside a stock checkpoint, in a file of its own. A router whose logits or choice are not those of a
stock one enters its reader in `routing.readers`. A module inside a decoder layer that reads token ids or positions has

    needs = {"input_ids", "position_ids"}

and finds them, flat int64 [T], in its `inputs` dictionary during each forward pass. So it is in training, packed or
not, when gradient checkpointing computes a layer again, and in generation with a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from tasks import plugin
from tasks.moe import gate, linear
from tasks.moe.internals.layers import hand_inputs


class Kind(Protocol):
    """One kind of block. `parts` is what its file holds; empty where a checkpoint has none."""

    def read(self, folder: Path, /) -> Any:
        """The parts beside a checkpoint. Raises ValueError for a damaged file."""

    def swap_in(self, model: nn.Module, parts: Any, /) -> None:
        """Put the parts into a stock model, in place. Raises ValueError if they do not fit."""

    def take_out(self, weights: dict[str, torch.Tensor], /, *, biases: list[list[float]] | None = None) -> Any:
        """Take the parts out of trained weights, in place, and leave the stock class's tensors there."""

    def write(self, folder: Path, parts: Any, /) -> None:
        """Write the parts beside a stock checkpoint."""

    def to_stock(self, folder: Path, parts: Any, windows: Callable[[], np.ndarray], /) -> Mapping[str, Any]:
        """Fit the stock tensors of a written checkpoint to the parts; what the stage reports of it.

        `windows` makes token windows [B, L] to fit on. Raises ValueError with the reason if no stock class holds it.
        """


def _fit_routers(folder: Path, gates: dict[int, gate.Gate], windows: Callable[[], np.ndarray]) -> dict[str, Any]:
    return {"gate_fit": linear.refit(folder, gates, windows())}


GATE: Kind = SimpleNamespace(
    read=gate.read, swap_in=gate.swap_in, take_out=gate.take_out, write=gate.write, to_stock=_fit_routers
)
"""The two-layer gate, noise and selection bias of gate.py; linear routers are fitted to them (linear.py)."""


def kinds() -> tuple[Kind, ...]:
    """Every kind of this installation, the core's first."""
    return (GATE, *plugin.modules("block").values())


def swap_in(model: nn.Module, folder: Path) -> None:
    """Put into a stock model what stands beside its checkpoint; before an engine takes the parameters."""
    for kind in kinds():
        kind.swap_in(model, kind.read(folder))
    hand_inputs(model)


def take_out(weights: dict[str, torch.Tensor], *, biases: list[list[float]] | None = None) -> list[tuple[Kind, Any]]:
    """Take what no stock class has out of trained weights, in place: the kinds that there were, with their parts."""
    parts = [(kind, kind.take_out(weights, biases=biases)) for kind in kinds()]
    return [(kind, each) for kind, each in parts if each]


def to_stock(folder: Path, parts: list[tuple[Kind, Any]], windows: Callable[[], np.ndarray]) -> dict[str, Any]:
    """Write the parts beside a stock checkpoint and fit its tensors to them; what the stage reports."""
    report: dict[str, Any] = {}
    for kind, each in parts:
        kind.write(folder, each)
        report |= kind.to_stock(folder, each, windows)
    return report
