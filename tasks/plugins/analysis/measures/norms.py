"""Whether the router prefers experts of large output (arXiv 2406.18219, section 4.2).

Shapes: T tokens, E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tasks.plugins.analysis.interface import Analysis, Figures, Map, defined, small
from tasks.plugins.analysis.layer import Layer


def measure(layer: Layer) -> Figures:
    """Counts of tokens by the rank of an expert's output norm and the rank of its score; all experts on each token."""
    table_EE = ranks(layer.outputs.norm_TX[:, layer.shared :], layer.text().logits_TE.cpu().numpy())
    experts, total = len(table_EE), int(table_EE.sum())
    away_EE = np.subtract.outer(np.arange(experts), np.arange(experts)) ** 2
    tokens = total // experts
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = 1 - 6 * float((table_EE * away_EE).sum()) / np.float64(tokens * experts * (experts**2 - 1))
    curves: dict[str, dict[str, float | None]] = {
        "same rank by norm and by score": {"share": float(np.trace(table_EE)) / total},
        "correlation of the ranks": {"Spearman": defined(correlation)},
    }
    reason = "" if experts > 1 else "one expert has one rank"
    return Figures(curves=curves, detail={"table": small(table_EE)}, undefined=reason)


def ranks(norm_TE: np.ndarray, score_TE: np.ndarray) -> np.ndarray:
    """How often the expert with the i-th largest norm has the j-th largest score: int64 [E, E]; every row sums to T.

    Equal numbers are ranked by the experts' order.
    """
    experts = norm_TE.shape[1]
    by_norm_TE, by_score_TE = (
        np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1) for values in (norm_TE, score_TE)
    )
    cells = (by_norm_TE * experts + by_score_TE).reshape(-1)
    return np.bincount(cells, minlength=experts**2).reshape(experts, experts)


def maps(details: Mapping[int, Mapping[str, Any]]) -> list[Map]:
    """The table of all layers together."""
    tables = [detail["table"] for detail in details.values() if detail["table"] is not None]
    if not tables:
        return []
    table_EE = np.sum(np.array(tables), axis=0)
    share_EE = table_EE / table_EE.sum(1, keepdims=True) * len(table_EE)
    caption = "Rows: rank by output norm, the largest on top. Columns: rank by score, the highest left. 1: by chance."
    return [Map(title="Output norm against gate score", grid=share_EE, top=3.0, caption=caption)]


ANALYSIS = Analysis(
    title="Output norm against gate score",
    note="All routed experts read every token; they are ranked by the L2 norm of their output and by the router's "
    "score. By chance the two ranks are the same for one expert in E, and do not correlate.",
    needs="text",
    measure=measure,
    maps=maps,
)
