"""Whether the router's rows are alike where the experts are (arXiv 2406.18219, section 3.3)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.plugins.analysis import cosine
from tasks.plugins.analysis.interface import Analysis, Figures, small
from tasks.plugins.analysis.layer import MATRICES, Layer

_CONSTANT = 1e-9
"""Cosines that differ by less are the same number."""


def measure(layer: Layer) -> Figures:
    """R² of the regression of expert similarity (mean neurons) on router similarity, over pairs of routed experts."""
    router_EE = cosine.of_rows(layer.router_ED)
    below = np.tril_indices(layer.experts, -1)
    curves: dict[str, float | None] = {}
    detail: dict[str, Any] = {"router": small(router_EE), "pairs": len(below[0]), "slope": {}, "r": {}}
    reasons = []
    for name in MATRICES:
        experts_EE = cosine.of_neurons(layer.matrix(name)[layer.shared :])
        fit, reason = regression(router_EE[below], experts_EE[below])
        curves[name] = None if fit is None else fit[1] ** 2
        if fit is None:
            reasons.append(f"{name}: {reason}")
        else:
            detail["slope"][name], detail["r"][name] = fit
    return Figures(curves={"R²": curves}, detail=detail, undefined="; ".join(reasons))


def regression(router_P: np.ndarray, experts_P: np.ndarray) -> tuple[tuple[float, float] | None, str]:
    """(slope, r) of a line through the pairs, or None with the reason why there is none."""
    from scipy.stats import linregress

    if len(router_P) < 3:
        return None, f"{len(router_P)} pairs of experts, and a line fits two exactly"
    for values, what in ((router_P, "router rows"), (experts_P, "experts")):
        if not np.isfinite(values).all():
            return None, f"some {what} are zero"
        if np.ptp(values) < _CONSTANT:
            return None, f"all pairs of {what} are equally alike (cosine {values.mean():.3f})"
    fit = linregress(router_P, experts_P)
    return (float(fit.slope), float(fit.rvalue)), ""


ANALYSIS = Analysis(
    title="Router rows against experts",
    note="Each pair of routed experts is a point: the cosine of their router rows, and that of their mean neurons. R² "
    "of a line through the points says how much of the experts' similarity the router's shows.",
    needs="weights",
    measure=measure,
)
