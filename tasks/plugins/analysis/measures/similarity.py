"""How alike the experts' weights are: whole matrices, and mean neurons (arXiv 2406.18219, sections 3.1 and 3.2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.plugins.analysis import cosine
from tasks.plugins.analysis.interface import Analysis, Figures, defined, small
from tasks.plugins.analysis.layer import MATRICES, Layer


def measure(layer: Layer) -> Figures:
    """Cosines of gate, up and down: between routed experts, and with the parent's weights at the same places."""
    whole: dict[str, float | None] = {}
    mean: dict[str, float | None] = {}
    own: dict[str, float | None] = {}
    detail: dict[str, Any] = {"shared": layer.shared, "matrices": {}, "mean_neurons": {}, "own_slice": {}}
    for name in MATRICES:
        weights_XFD = layer.matrix(name)
        for values, kept, cosines_XX in (
            (whole, detail["matrices"], cosine.of_matrices(weights_XFD)),
            (mean, detail["mean_neurons"], cosine.of_neurons(weights_XFD)),
        ):
            values[name] = defined(cosine.mean_of_pairs(cosines_XX[layer.shared :, layer.shared :]))
            kept[name] = small(cosines_XX)
        if (source := layer.source(name)) is not None:
            own_X = cosine.of_pairs(weights_XFD, source)
            own[name], detail["own_slice"][name] = defined(float(own_X.mean())), own_X
    curves = {"between experts: whole matrices": whole, "between experts: mean neurons": mean}
    if own:
        curves["with the parent's neurons at the same places"] = own
    if layer.parent is not None and layer.parent.places is not None:
        detail["neurons_in_common"] = small(common(layer.parent.places[layer.number]))
    return Figures(curves=curves, detail=detail)


def common(places_XF: np.ndarray) -> np.ndarray:
    """Share of an expert's neurons that another holds too, [X, X]."""
    member_XN = np.zeros((len(places_XF), int(places_XF.max()) + 1), dtype=np.int64)
    np.put_along_axis(member_XN, places_XF.astype(np.int64), 1, axis=1)
    shares: np.ndarray = member_XN @ member_XN.T / places_XF.shape[1]
    return shares


ANALYSIS = Analysis(
    title="Similarity of the experts' weights",
    note="Cosine of two experts' weights, mean over all pairs of routed experts: of their matrices as they lie, and "
    "of the means over their neurons. 1: copies; 0: nothing in common, or the same neurons in another order. With the "
    "parent's neurons: 1 where nothing has moved.",
    needs="weights",
    measure=measure,
)
