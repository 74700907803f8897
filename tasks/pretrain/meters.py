"""Figures of a step: load of the experts, memory, FLOP/s and the share of the machine's peak (MFU).

L = sparse layers, E = experts of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tasks.settings.pretrain import What


def expert_load(load_LE: np.ndarray, *, detailed: bool) -> dict[str, Any]:
    """How evenly the tokens of a step were spread over the experts.

    Args:
        load_LE: tokens per sparse layer and expert, over all ranks.
        detailed: the counts too.

    Returns:
        used: share of the experts that got tokens; entropy: of the shares, over that of the even spread (1: even);
        peak: the busiest expert's share of the tokens; each the mean over the layers. dead: experts without tokens,
        over all layers. layers: {used, entropy, peak}: a number a layer each, in the order of the sparse layers.
        tokens: load_LE as lists, if `detailed`. An empty dict for a dense model.
    """
    raise NotImplementedError


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of this process: rss, rss_peak; on CUDA also allocated, allocated_peak, reserved_peak."""
    raise NotImplementedError


def flops(config: Any, *, seq_len: int, what: What = "all") -> int:
    """FLOPs of training on one token: forward, and backward for `what` is trained, on active parameters."""
    raise NotImplementedError


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is a share of: a known card's dense peak, else the speed of a square matrix product here."""
    raise NotImplementedError


def timing(
    seconds: float,
    spent: dict[str, float],
    *,
    tokens: int,
    flops_per_token: int,
    peak: float,
    device: torch.device,
) -> dict[str, Any]:
    """A step record's `timing`.

    Args:
        seconds: of the whole step.
        spent: seconds of its parts: data, forward, backward, optimizer.
        tokens: of the global batch.
        flops_per_token: `flops`.
        peak: FLOP/s of all ranks together.
        device: this rank's.

    Returns:
        seconds, the parts, other (the rest), tokens_per_second, flops_per_second, mfu, memory.
    """
    raise NotImplementedError
