"""Which experts the tokens of a domain, and of a kind, go to.

Shapes: G groups of tokens, E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tasks.plugins.analysis.interface import LARGEST, Analysis, Figures, Map
from tasks.plugins.analysis.layer import Layer


def measure(layer: Layer) -> Figures:
    """Tokens of each group on each expert, and how far a group's share is from that of all tokens."""
    seen = layer.text()
    chosen_TK = seen.chosen_TK.cpu().numpy()
    curves: dict[str, float | None] = {}
    loads: dict[str, Any] = {}
    for what, (names, group_T) in seen.text.groups().items():
        load_GE = counts(chosen_TK, group_T, groups=len(names), experts=layer.experts)
        loads[what] = {name: load for name, load in zip(names, load_GE, strict=True) if load.any()}
        curves[f"by {what}"] = distance(load_GE)
    return Figures(curves={"distance from the routing of all tokens": curves}, detail={"load": loads})


def counts(chosen_TK: np.ndarray, group_T: np.ndarray, *, groups: int, experts: int) -> np.ndarray:
    """Tokens of each group that pass each expert: int64 [G, E]; the sum is T x K."""
    cells = (group_T[:, None] * experts + chosen_TK).reshape(-1)
    return np.bincount(cells, minlength=groups * experts).reshape(groups, experts)


def distance(load_GE: np.ndarray) -> float:
    """Total variation distance of a group's load from that of all tokens, mean over the groups by their tokens.

    It is the share of the routed tokens that would have to change experts.
    """
    share_E = load_GE.sum(0) / load_GE.sum()
    size_G = load_GE.sum(1)
    far_G = np.abs(load_GE / np.maximum(size_G, 1)[:, None] - share_E).sum(1) / 2
    return float(far_G @ size_G / size_G.sum())


def maps(details: Mapping[int, Mapping[str, Any]]) -> list[Map]:
    """Domains and kinds of tokens by expert, in the layer where the groups are furthest apart."""
    drawn = []
    for what in next(iter(details.values()))["load"]:
        loads = {layer: np.array(list(detail["load"][what].values())) for layer, detail in details.items()}
        layer = max(loads, key=lambda layer: distance(loads[layer]))
        load_GE = loads[layer]
        if load_GE.shape[1] > LARGEST:
            continue
        grid = load_GE / load_GE.sum(1, keepdims=True) * load_GE.shape[1]
        caption = (
            f"Layer {layer}, where they are furthest apart: the share of a row's tokens on each routed expert, "
            "divided by the even share."
        )
        drawn.append(
            Map(title=f"Load by {what}", grid=grid, rows=tuple(details[layer]["load"][what]), top=3.0, caption=caption)
        )
    return drawn


ANALYSIS = Analysis(
    title="Load by domain and by kind of token",
    note="Share of the routed tokens of a domain, or of a kind (the start of a word, digits, punctuation, …), that "
    "would have to change experts to be routed like all tokens: total variation distance, mean over the groups by "
    "their tokens. A group of few tokens is further away by chance.",
    needs="text",
    measure=measure,
    maps=maps,
)
