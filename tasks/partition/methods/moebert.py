"""MoEBERT (arXiv 2204.07675, section 3.2): the most important neurons in every expert, the others dealt by rank."""

from __future__ import annotations

import numpy as np

from tasks import settings
from tasks.partition.layer import Layer, Sizes
from tasks.partition.methods import method
from tasks.partition.methods.importance import scores


@method("moebert", needs="gradients")
def split(layer: Layer, sizes: Sizes, options: settings.Partition) -> np.ndarray:
    """int32 [E, F], the most important first: ranks 0 to s - 1, then s + e, s + e + E, ... for expert e.

    s is `common_neurons`, 0 if absent: with more than one expert per token the common ones count several times, while
    the paper, with one, has two thirds of F. Ranks beyond the last expert's F are in no expert.
    """
    common = options.common_neurons or 0
    rank_N = np.argsort(-scores(layer).sum(0), kind="stable")
    dealt = rank_N[common : common + (sizes.size - common) * sizes.experts].reshape(-1, sizes.experts).T
    return np.concatenate([np.tile(rank_N[:common], (sizes.experts, 1)), dealt], axis=1).astype(np.int32)
