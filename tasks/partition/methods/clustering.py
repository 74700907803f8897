"""Independent-Clustering (LLaMA-MoE, arXiv 2406.16554, section 3.1): balanced k-means on the neurons' weights.

A neuron is its row of gate_proj, of up_proj, its column of down_proj, or several of them side by side (`rows`). Each
matrix is first divided by the root mean square of its entries, so that none dominates. With `metric: l2` the rows are
clustered as they are, so that a neuron's size counts; with `cosine` on the unit sphere, where only its direction does
(close to the original code, which puts normalised rows into Euclidean k-means).
"""

from __future__ import annotations

import numpy as np

from tasks import settings
from tasks.partition import assignment
from tasks.partition.layer import Layer, Sizes
from tasks.partition.methods import method


@method("clustering", needs="weights")
def split(layer: Layer, sizes: Sizes, options: settings.Partition) -> np.ndarray:
    """Every expert a cluster of similar neurons, sorted within: int32 [E, F]."""
    weights = {"gate": layer.gate_ND, "up": layer.up_ND, "down": layer.down_DN.T}
    chosen = [weights[name] for name in options.rows or ["up"]]
    rows_NP = np.concatenate([(w / w.square().mean().sqrt()).cpu().numpy() for w in chosen], axis=1)
    group_N = assignment.kmeans(
        rows_NP,
        sizes_G=np.full(sizes.experts, sizes.size),
        generator=np.random.default_rng([options.seed, layer.number]),
        cosine=options.metric == "cosine",
    )
    return assignment.members(group_N, size=sizes.size)
