"""Balance of the routing, layer by layer, because an average over the layers hides a single collapsed one.

Shapes: L sparse layers, E routed experts of a layer, of which a token passes K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_DIGITS = 4


def balance(load: Mapping[str, Any], *, layers: Sequence[int], top_k: int) -> dict[str, Any]:
    """How evenly the tokens of all domains spread over the experts of each layer.

    Args:
        load: {domain: [L][E] tokens}.
        layers: [L], the numbers of the sparse layers in the model, from 0.
        top_k: K.

    Returns:
        {} for a model without sparse layers, else
        peak: load of the busiest expert over the mean load, averaged over layers (1 = even);
        unused: share of experts that no token went to;
        even: K / E, the share of a layer's load that K experts take if all take the same;
        limit: half-way from `even` to 1, above which a layer counts as collapsed;
        collapsed: how many layers do;
        worst: the layer whose K busiest experts take most: {layer, busiest, max_share, unused};
        layers: the same figures for every layer, as lists. busiest: share of the load that the K busiest experts take
        (1 = the router always chooses the same K); max_share: share of the tokens that pass the busiest expert;
        unused: experts without a token.
    """
    if not layers:
        return {}
    load_LE = np.sum([np.asarray(counts_LE) for counts_LE in load.values()], axis=0)
    total_L = np.maximum(load_LE.sum(1), 1)
    sorted_LE = -np.sort(-load_LE, axis=1)
    busiest_L = sorted_LE[:, :top_k].sum(1) / total_L
    even = top_k / load_LE.shape[1]
    limit = (1 + even) / 2
    every = {
        "layer": list(layers),
        "busiest": busiest_L.round(_DIGITS).tolist(),
        "max_share": (sorted_LE[:, 0] * top_k / total_L).round(_DIGITS).tolist(),
        "unused": (load_LE == 0).sum(1).tolist(),
    }
    worst = int(busiest_L.argmax())
    return {
        "peak": float((load_LE.max(1) / np.maximum(load_LE.mean(1), 1e-12)).mean()),
        "unused": float((load_LE == 0).mean()),
        "even": even,
        "limit": limit,
        "collapsed": int((busiest_L > limit).sum()),
        "worst": {name: values[worst] for name, values in every.items()},
        "layers": every,
    }
