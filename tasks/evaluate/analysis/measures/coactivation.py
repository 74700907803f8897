"""Which experts act on the same tokens.

Shapes: T tokens, K experts of a token, E routed experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.evaluate.analysis.interface import Analysis, Figures, small
from tasks.evaluate.analysis.layer import Layer

_STRONGEST = 5


def measure(layer: Layer) -> Figures:
    """How far the pairs of experts are from those of experts that are chosen independently, by their loads."""
    chosen_TK = layer.text().chosen_TK.cpu().numpy()
    if layer.top_k < 2:
        reason = "top_k = 1: no two routed experts act on one token"
        return Figures(curves={"distance from independence": {"pairs": None}}, undefined=reason)
    pairs_EE = pairs(chosen_TK, experts=layer.experts)
    load_E, below = pairs_EE.diagonal(), np.tril_indices(layer.experts, -1)
    together_P, expected_P = pairs_EE[below], np.outer(load_E, load_E)[below].astype(np.float64)
    share_P, expected_P = together_P / together_P.sum(), expected_P / expected_P.sum()
    order = np.argsort(-together_P, kind="stable")[:_STRONGEST]
    detail: dict[str, Any] = {
        "pairs": small(pairs_EE),
        "strongest": [
            {
                "experts": [int(below[1][i]), int(below[0][i])],
                "tokens": int(together_P[i]),
                "over_independent": float(share_P[i] / expected_P[i]) if expected_P[i] else None,
            }
            for i in order
        ],
    }
    far = float(np.abs(share_P - expected_P).sum() / 2)
    return Figures(curves={"distance from independence": {"pairs": far}}, detail=detail)


def pairs(chosen_TK: np.ndarray, *, experts: int) -> np.ndarray:
    """Tokens that pass both experts, int64 [E, E]; the diagonal is the load, and a row sums to K times it."""
    chosen_TE = np.zeros((len(chosen_TK), experts), dtype=np.int64)
    np.put_along_axis(chosen_TE, chosen_TK, 1, axis=1)
    return chosen_TE.T @ chosen_TE


ANALYSIS = Analysis(
    title="Experts that act together",
    note="Pairs of routed experts on the same token, against pairs of the same loads chosen independently: total "
    "variation distance, 0 where the choice of one says nothing of the other.",
    needs="text",
    measure=measure,
)
