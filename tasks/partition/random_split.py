"""Independent-Random split (LLaMA-MoE, arXiv 2406.16554, section 3.1): every expert a random set of neurons."""

from __future__ import annotations

import numpy as np


def split_layer(width: int, *, experts: int, seed: int, layer: int) -> np.ndarray:
    """Cut `width` neurons into equal random sets, sorted within: int32 [experts, width / experts]."""
    order = np.random.default_rng([seed, layer]).permutation(width).astype(np.int32)
    return np.sort(order.reshape(experts, -1), axis=1)
