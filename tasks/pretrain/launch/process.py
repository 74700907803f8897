"""One process of a run, among the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process's rank and device."""

    rank: int
    world_size: int
    device: torch.device
    hosts: list[str]
    """The machine of every rank."""
