"""How alike the outputs of all experts are on the same tokens (arXiv 2406.18219, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tasks.plugins.analysis import cosine
from tasks.plugins.analysis.interface import Analysis, Figures, Map, defined, small
from tasks.plugins.analysis.layer import Layer


def measure(layer: Layer) -> Figures:
    """Angular similarity, 1 - arccos(cosine) / pi, mean over the tokens and over pairs."""
    outputs, shared = layer.outputs, layer.shared
    angular = {"routed with routed": defined(cosine.mean_of_pairs(outputs.angular_XX[shared:, shared:]))}
    if shared:
        angular["routed with shared"] = float(outputs.angular_XX[shared:, :shared].mean())
    detail = {"shared": shared, "angular": small(outputs.angular_XX), "cosine": small(outputs.cosine_XX)}
    return Figures(curves={"angular similarity": angular}, detail=detail)


def maps(details: Mapping[int, Mapping[str, Any]]) -> list[Map]:
    """All pairs of experts, mean over the layers."""
    grids = [detail["angular"] for detail in details.values() if detail["angular"] is not None]
    if not grids:
        return []
    shared = next(iter(details.values()))["shared"]
    order = f"{shared} shared first" if shared else "all routed"
    caption = (
        f"Angular similarity of the outputs of two experts ({order}), mean over tokens and layers. ½: orthogonal."
    )
    return [Map(title="Outputs of two experts", grid=np.mean(np.array(grids), axis=0), top=1.0, caption=caption)]


ANALYSIS = Analysis(
    title="Similarity of the experts' outputs",
    note="All experts read every token, chosen or not. Angular similarity is 1 − arccos(cosine) / π: 1 for the same "
    "direction, ½ for orthogonal outputs.",
    needs="text",
    measure=measure,
    maps=maps,
)
