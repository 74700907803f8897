"""Sparse upcycling (arXiv 2212.05055): every expert a copy of the dense FFN, or a slice of a copy.

With slices (granular upcycling, arXiv 2410.07524, section 4.2) expert e = c * slices + g holds slice g of copy c. The
experts of a copy form a virtual group with one router row in common (`router_rows`), so that top-k picks whole copies.

What makes the copies differ: `noise`, on all of them (Qwen1.5-MoE adds randomness to all; plain sparse upcycling to
none), or `reinitialise`, Drop-Upcycling (arXiv 2502.19261, section 3).

Shapes: E experts, F neurons per expert, D hidden.
"""

from __future__ import annotations

import numpy as np
import torch

from tasks import settings
from tasks.partition.layer import Layer, Sizes
from tasks.partition.methods import method


@method("copy", needs="nothing")
def split(layer: Layer, sizes: Sizes, options: settings.Partition) -> np.ndarray:
    """int32 [E, F]: contiguous slices of the FFN, copy after copy."""
    slices_GF = np.arange(sizes.width, dtype=np.int32).reshape(-1, sizes.size)
    return np.tile(slices_GF, (sizes.experts // len(slices_GF), 1))


def router_rows(experts: int, *, slices: int) -> np.ndarray:
    """The copy that each expert is a slice of, int64 [E]: experts of one copy share a router row."""
    return np.arange(experts) // slices


def perturbed(
    gate_EFD: torch.Tensor, up_EFD: torch.Tensor, down_EDF: torch.Tensor, *, options: settings.Partition, layer: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make the copies differ as `noise` and `reinitialise` say; the arguments are changed in place and returned.

    noise s: every weight gets N(0, (s * std)^2), std being that of its matrix. reinitialise r: each expert loses a
    random share r of its neurons, the same ones in gate, up and down, to N(mean, std^2) of each matrix.

    Args:
        gate_EFD, up_EFD, down_EDF: float32, without a factor folded into down.
        options: noise, reinitialise, seed.
        layer: its number, which the random numbers depend on.
    """
    experts, size = gate_EFD.shape[:2]
    generator = np.random.default_rng([options.seed, layer])
    redrawn = [generator.permutation(size)[: round((options.reinitialise or 0) * size)] for _ in range(experts)]
    draw = torch.Generator().manual_seed(int(generator.integers(2**63)))
    for weights_EFD in (gate_EFD, up_EFD, down_EDF.mT):
        std, mean = torch.std_mean(weights_EFD, correction=0)
        for weight_FD, rows in zip(weights_EFD, redrawn, strict=True):
            if options.noise:
                weight_FD += options.noise * std * torch.randn(weight_FD.shape, generator=draw)
            weight_FD[rows] = mean + std * torch.randn((len(rows), weight_FD.shape[1]), generator=draw)
    return gate_EFD, up_EFD, down_EDF
