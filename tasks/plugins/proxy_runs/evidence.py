"""What the methods of a swarm say of their fits: held-out predictions, their rank correlation, and the spread."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Law = Callable[[Array], Array]
"""Mixes [U, D] to losses [U]."""
FOLDS = 5


def require(package: str, *, method: str) -> None:
    """Raise ValueError before anything is trained if the package that fits the law is not here."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"mixture.method = {method!r} needs {package}: pip install 'moeforge[mixture]'")


def held_out(fit: Callable[[Array, Array], Law], weights_UD: Array, losses_U: Array, *, seed: int) -> Array:
    """The prediction of every unit by a fit that has not seen it: a fifth of the units is left out at a time."""
    fold_U = np.random.default_rng(seed).permutation(len(losses_U)) % FOLDS
    predicted_U = np.empty(len(losses_U))
    for fold in range(FOLDS):
        out_U = fold_U == fold
        predicted_U[out_U] = fit(weights_UD[~out_U], losses_U[~out_U])(weights_UD[out_U])
    return predicted_U


def agreement(predicted_U: Array, measured_U: Array) -> dict[str, Any]:
    """The entry `fit` of the evidence. Units whose losses are all the same have no ranks, and no correlation."""
    return {
        "predicted": predicted_U.tolist(),
        "measured": measured_U.tolist(),
        "spearman": spearman(predicted_U, measured_U),
        "units": len(measured_U),
    }


def spearman(predicted_U: Array, measured_U: Array) -> float | None:
    """Rank correlation; None where one side is constant."""
    from scipy import stats

    if np.ptp(predicted_U) == 0 or np.ptp(measured_U) == 0:
        return None
    return float(stats.spearmanr(predicted_U, measured_U).statistic)


def resampled(count: int, *, units: int, seed: int) -> list[NDArray[np.int64]]:
    """Bootstrap samples: the numbers of `units` units, drawn with replacement, `count` times."""
    rng = np.random.default_rng(seed)
    return [rng.integers(units, size=units) for _ in range(count)]


def spread(domains: list[str], weights: list[Array]) -> dict[str, Any]:
    """The entries on the spread of the weights over bootstrap fits: a standard deviation for each domain."""
    over_D = np.std(np.stack(weights), axis=0, ddof=1)
    return {"spread": dict(zip(domains, over_D.tolist(), strict=True)), "spread_over": "bootstrap"}
