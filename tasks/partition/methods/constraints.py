"""The constraints of each method: where a neuron of the dense FFN may stand, and how often."""

from __future__ import annotations

import numpy as np

from tasks import settings
from tasks.partition.layer import Sizes


def problems(layer_EF: np.ndarray, *, sizes: Sizes, options: settings.Partition) -> list[str]:
    """What is wrong with one layer's neuron indices [S + E, F] under the method's constraints; empty if nothing.

    Every method's experts hold distinct neurons. Beyond that: importance with sharing inner lets experts overlap;
    moebert has `common_neurons` in all experts, and others in one or none; copy has every neuron in as many experts as
    there are copies; token_clusters has those of shared experts nowhere else, and others anywhere; all others have
    every neuron exactly once.

    Returns:
        predicates without a subject ("is no partition of ..."), to be put behind "layer 3".
    """
    shape = (sizes.shared + sizes.experts, sizes.size)
    if layer_EF.shape != shape:
        return [f"has the shape {layer_EF.shape}, but its experts are {shape}"]
    if layer_EF.dtype.kind not in "iu" or layer_EF.min() < 0 or layer_EF.max() >= sizes.width:
        return [
            f"has entries from {layer_EF.min()} to {layer_EF.max()}; allowed: whole numbers, 0 to {sizes.width - 1}"
        ]
    wrong = []
    ordered_EF = np.sort(layer_EF, axis=1)
    if twice := np.unique(ordered_EF[:, 1:][ordered_EF[:, 1:] == ordered_EF[:, :-1]])[:5].tolist():
        wrong.append(f"has experts with a neuron twice: {twice}")
    times_N = np.bincount(layer_EF.reshape(-1), minlength=sizes.width)
    if options.method == "moebert":
        common = options.common_neurons or 0
        everywhere = int((times_N == sizes.experts).sum())
        if everywhere != common and sizes.experts > 1:
            wrong.append(f"has {everywhere} neurons in all {sizes.experts} experts, but common_neurons = {common}")
        if elsewhere := np.flatnonzero((times_N > 1) & (times_N != sizes.experts))[:5].tolist():
            wrong.append(f"has neurons in some experts, neither one nor all: {elsewhere}")
    elif options.method == "token_clusters":
        shared_M = layer_EF[: sizes.shared].reshape(-1)
        if elsewhere := shared_M[times_N[shared_M] != 1][:5].tolist():
            wrong.append(f"has neurons in shared experts and in others: {elsewhere}")
    elif options.sharing != "inner":
        copies = sizes.experts * sizes.size // sizes.width if options.method == "copy" else 1
        if others := np.flatnonzero(times_N != copies)[:5].tolist():
            often = "once" if copies == 1 else f"{copies} times"
            wrong.append(
                f"is no partition of the {sizes.width} neurons under method `{options.method}`: not there exactly "
                f"{often}: {others}"
            )
    return wrong
