"""One step of each estimator as a function of numbers, in double precision.

Weights are positive and sum to 1. D domains, T domains whose loss is to fall.

A run's estimate is the mean of the weights after its steps, (1/n) sum of w_1 .. w_n, as in the papers of DoReMi and
DoGE. DoReMi's repository counts the weights before the first step, w_0, too (its buffer starts there).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

STEP_SIZE, SMOOTHING = 1.0, 1e-3
"""DoReMi's eta and c (arXiv 2305.10429, algorithm 1)."""
MU, CEILING = 0.01, 5.0
"""DoGE's mu (arXiv 2310.15393), and the largest score in learning rates (Olivia-fsm/DoGE, src/trainer.py)."""
ONE_HOT, ETA = 0.625, 0.2
"""Aioli's delta, the share of the domain that a sweep is about, and eta (arXiv 2411.05735; HazyResearch/aioli)."""
_LEAST = math.log(1e-300)  # a weight that underflowed to 0 could not rise again


def doremi(
    weights: Mapping[str, float],
    *,
    excess: Mapping[str, float],
    step_size: float = STEP_SIZE,
    smoothing: float = SMOOTHING,
) -> dict[str, float]:
    """One step of DoReMi: w <- (1 - c) softmax(ln w + eta excess) + c / D (arXiv 2305.10429, algorithm 1).

    The smoothing keeps every domain alive: none falls below c / D.

    Args:
        excess: of each domain, the mean over its tokens of max(loss - reference loss, 0), nats. It is clipped token by
            token; a mean that is clipped afterwards is another number.

    Raises:
        ValueError: a domain is missing, or a number isn't finite.
    """
    moved = _raised(weights, by={domain: step_size * _finite(excess, domain) for domain in weights})
    return {domain: (1 - smoothing) * weight + smoothing / len(moved) for domain, weight in moved.items()}


def doge(
    weights: Mapping[str, float],
    *,
    gains: Mapping[str, float],
    norms: Mapping[str, float],
    rate: float,
    mu: float = MU,
) -> dict[str, float]:
    """One step of DoGE: w <- softmax(ln w + score / mu) (arXiv 2310.15393, eq. 5 and algorithm 1).

    The score is rate x gain / mean of the norms, between 0 and CEILING x rate as in the repository.

    Args:
        gains: of each domain, the product of its gradient with the sum of those whose loss is to fall (`gains`). A
            domain that the batch lacks has none, and its score is 0.
        norms: of the gradients of the domains in the batch.
        rate: the learning rate of the step.

    Raises:
        ValueError: a number isn't finite.
    """
    mean = math.fsum(norms.values()) / max(len(norms), 1) + 1e-6
    scores = {domain: rate * _finite(gains, domain) / mean if domain in gains else 0.0 for domain in weights}
    return _raised(weights, by={d: min(max(score, 0.0), CEILING * rate) / mu for d, score in scores.items()})


def gains(products_DD: NDArray[np.float64]) -> NDArray[np.float64]:
    """The product of each domain's gradient with the sum of all others', from the products of all pairs, [D].

    The diagonal is left out: that a domain's own text lowers its own loss says nothing of the others.
    """
    others_D: NDArray[np.float64] = products_DD.sum(1) - np.diagonal(products_DD)
    return others_D


def smoothed_one_hot(domains: Sequence[str], *, on: str, share: float = ONE_HOT) -> dict[str, float]:
    """The mix of a sweep about one domain: `share` of it, and the same of every other. Two domains or more."""
    rest = (1 - share) / (len(domains) - 1)
    return {domain: share if domain == on else rest for domain in domains}


def effects(drops_TD: NDArray[np.float64], *, share: float = ONE_HOT) -> NDArray[np.float64]:
    """What training on each domain alone would have done, from sweeps on smoothed one-hot mixes, [T, D].

    A drop is linear in the mix: drop of t in the sweep on j = sum over m of mix of j at m x effect of m on t. That is
    a system of D equations for each t (LearnParams in HazyResearch/aioli, trainer/aioli_trainer.py).

    Args:
        drops_TD: by how much the loss of each target fell in the sweep on each domain, mean over the sweeps, nats.
    """
    size = drops_TD.shape[1]
    mixes_DD = np.full((size, size), (1 - share) / (size - 1))
    np.fill_diagonal(mixes_DD, share)
    return np.linalg.solve(mixes_DD, drops_TD.T).T


def aioli(
    weights: Mapping[str, float],
    *,
    effects_TD: NDArray[np.float64],
    importance_T: Sequence[float] | None = None,
    eta: float = ETA,
) -> dict[str, float]:
    """One update of Aioli: p <- p exp(eta x sum over t of A_tj), normalised (arXiv 2411.05735, algorithm 1).

    A is the effects, shifted so that none is negative if one is, and scaled to the sum 1.

    Args:
        effects_TD: from `effects`, columns in the order of the weights.
        importance_T: weights of the targets, normalised here to the mean 1; equal if absent.

    Raises:
        ValueError: an effect isn't finite.
    """
    if not np.isfinite(effects_TD).all():
        raise ValueError(f"effects {effects_TD.tolist()} must be finite")
    shifted_TD = effects_TD - min(effects_TD.min(), 0.0)
    if importance_T is not None:
        shifted_TD = shifted_TD * (np.array(importance_T) / np.mean(importance_T))[:, None]
    total = shifted_TD.sum()
    scaled_D = shifted_TD.sum(0) / total if total > 0 else np.zeros(len(weights))
    return _raised(weights, by=dict(zip(weights, (eta * scaled_D).tolist(), strict=True)))


def _raised(weights: Mapping[str, float], *, by: Mapping[str, float]) -> dict[str, float]:
    """softmax(ln w + by)."""
    logs = {
        domain: max(math.log(weight) if weight else _LEAST, _LEAST) + by[domain] for domain, weight in weights.items()
    }
    top = max(logs.values())
    raised = {domain: math.exp(value - top) for domain, value in logs.items()}
    total = math.fsum(raised.values())
    return {domain: value / total for domain, value in raised.items()}


def _finite(values: Mapping[str, float], domain: str) -> float:
    value = values.get(domain, math.nan)
    if not math.isfinite(value):
        raise ValueError(f"no finite number for {domain}; found {dict(values)}")
    return value
