"""Cosines of experts' weights in float64, a few neurons at a time.

Shapes: X experts, F neurons of each, D hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 23  # numbers that are turned to float64 at once


def of_matrices(weights_XFD: Tensor) -> np.ndarray:
    """Cosines of the experts' flattened matrices, [X, X]; NaN for a matrix of zeros."""
    experts = len(weights_XFD)
    dots_XX = torch.zeros(experts, experts, dtype=torch.float64, device=weights_XFD.device)
    for part in _parts(weights_XFD, experts):
        rows = part.flatten(1).double()
        dots_XX += rows @ rows.T
    norm_X = dots_XX.diagonal().sqrt()
    return _divided(dots_XX, norm_X[:, None] * norm_X)


def of_pairs(first_XFD: Tensor, second_XFD: Tensor) -> np.ndarray:
    """Cosines of matrices with those at the same places in the second, [X]; either may be one for all."""
    count = max(len(first_XFD), len(second_XFD))
    sums = torch.zeros(3, count, dtype=torch.float64, device=first_XFD.device)
    for first, second in zip(_parts(first_XFD, count), _parts(second_XFD, count), strict=True):
        a, b = first.double(), second.to(first).double()
        for total, product in zip(sums, (a * b, a * a, b * b), strict=True):
            total += product.sum((1, 2))
    return _divided(sums[0], (sums[1] * sums[2]).sqrt())


def of_rows(rows_XD: Tensor) -> np.ndarray:
    """Cosines of vectors, [X, X]; NaN for a vector of zeros."""
    return of_matrices(rows_XD[:, None])


def of_neurons(weights_XFD: Tensor) -> np.ndarray:
    """Cosines of the experts' mean neurons, [X, X]."""
    parts = _parts(weights_XFD, len(weights_XFD))
    return of_rows(torch.stack([part.double().sum(1) for part in parts]).sum(0))


def _parts(weights_XFD: Tensor, experts: int) -> tuple[Tensor, ...]:
    """The same neurons of all experts at once, as many as make _CHUNK numbers of so many experts."""
    parts: tuple[Tensor, ...] = weights_XFD.split(max(1, _CHUNK // (experts * weights_XFD.shape[2])), dim=1)
    return parts


def _divided(dots: Tensor, norms: Tensor) -> np.ndarray:
    values: np.ndarray = (dots / norms).cpu().numpy()
    return values


def mean_of_pairs(values_XX: np.ndarray) -> float:
    """Mean over all pairs of different experts, those that are no number left out; NaN for fewer than two."""
    values = values_XX[np.tril_indices(len(values_XX), -1)]
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
