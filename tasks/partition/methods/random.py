"""Independent-Random (LLaMA-MoE, arXiv 2406.16554, section 3.1): every expert a random set of neurons."""

from __future__ import annotations

import numpy as np

from tasks import settings
from tasks.partition.layer import Layer, Sizes
from tasks.partition.methods import method


@method("random", needs="nothing")
def split(layer: Layer, sizes: Sizes, options: settings.Partition) -> np.ndarray:
    """Cut the neurons into equal random sets, sorted within: int32 [E, F]."""
    order_N = np.random.default_rng([options.seed, layer.number]).permutation(sizes.width).astype(np.int32)
    return np.sort(order_N.reshape(sizes.experts, sizes.size), axis=1)
