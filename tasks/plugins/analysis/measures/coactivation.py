"""Which experts act on the same tokens.

Shapes: T tokens, K experts of a token, E routed experts, P pairs of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.plugins.analysis.interface import Analysis, Figures, small
from tasks.plugins.analysis.layer import Layer

_STRONGEST = 5


def measure(layer: Layer) -> Figures:
    """How far pairs of experts are from those chosen independently: of this layer, and of this and the one below."""
    seen = layer.text()
    chosen_TE = one_hot(seen.chosen_TK.cpu().numpy(), experts=layer.experts)
    load_E, below = chosen_TE.sum(0), np.tril_indices(layer.experts, -1)
    curves: dict[str, float | None] = {"in a layer": None, "with the layer below": None}
    detail: dict[str, Any] = {}
    reasons = []
    if layer.top_k > 1:
        pairs_EE = chosen_TE.T @ chosen_TE
        curves["in a layer"] = distance(pairs_EE[below], np.outer(load_E, load_E)[below])
        detail |= {"pairs": small(pairs_EE), "strongest": strongest(pairs_EE, load_E)}
    else:
        reasons.append("in a layer: top_k = 1, so that no two routed experts act on one token")
    if seen.below_TK is not None:
        below_TE = one_hot(seen.below_TK.cpu().numpy(), experts=layer.experts)
        paths_EE = below_TE.T @ chosen_TE
        curves["with the layer below"] = distance(paths_EE, np.outer(below_TE.sum(0), load_E))
        detail["from_below"] = small(paths_EE)
    else:
        reasons.append("with the layer below: it is the first")
    return Figures(curves={"distance from independence": curves}, detail=detail, undefined="; ".join(reasons))


def one_hot(chosen_TK: np.ndarray, *, experts: int) -> np.ndarray:
    """1 where a token passes an expert, int64 [T, E].

    Its product with itself counts the tokens that pass both experts of a pair: the diagonal is the load, and a row
    sums to K times it.
    """
    chosen_TE = np.zeros((len(chosen_TK), experts), dtype=np.int64)
    np.put_along_axis(chosen_TE, chosen_TK, 1, axis=1)
    return chosen_TE


def distance(counts: np.ndarray, independent: np.ndarray) -> float:
    """Total variation distance of two tables of counts, each divided by its sum."""
    return float(np.abs(counts / counts.sum() - independent / independent.sum()).sum() / 2)


def strongest(pairs_EE: np.ndarray, load_E: np.ndarray) -> list[dict[str, Any]]:
    """The pairs of a layer that act together most often, and how much more often than independent ones."""
    high, low = np.tril_indices(len(load_E), -1)
    together_P, independent_P = pairs_EE[high, low], load_E[high] * load_E[low]
    order = np.argsort(-together_P, kind="stable")[:_STRONGEST]
    scale = independent_P.sum() / together_P.sum()
    return [
        {
            "experts": [int(low[i]), int(high[i])],
            "tokens": int(together_P[i]),
            "over_independent": float(together_P[i] / independent_P[i] * scale) if independent_P[i] else None,
        }
        for i in order
    ]


ANALYSIS = Analysis(
    title="Experts that act together",
    note="Pairs of routed experts on the same token, in a layer and in two sparse layers that follow each other, "
    "against pairs of the same loads chosen independently: total variation distance, 0 where the choice of one says "
    "nothing of the other.",
    needs="text",
    measure=measure,
)
