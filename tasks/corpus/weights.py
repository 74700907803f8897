"""Domain weights as numbers: the dynamic-batch-loading update, and the integers the sampler counts with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

ONE = 1 << 32  # a weight of 1


def update(
    weights: Mapping[str, float], *, losses: Mapping[str, float], references: Mapping[str, float]
) -> dict[str, float]:
    """One step of dynamic batch loading (Sheared-LLaMA, arXiv 2310.06694, algorithm 1).

    w <- w exp(max(loss - reference, 0)), normalised: domains above their reference loss are drawn more.

    Args:
        weights: the weights in use, per domain; they need not sum to 1.
        losses: held-out loss now, nats per token.
        references: the loss each domain is to reach.

    Raises:
        ValueError: a domain is missing, or a number isn't finite.
    """
    for name, values in (("losses", losses), ("references", references)):
        bad = [d for d in weights if not math.isfinite(values.get(d, math.nan))]
        if bad:
            raise ValueError(f"{name}: no finite number for {', '.join(bad)}; found {dict(values)}")
    excess = {domain: max(losses[domain] - references[domain], 0.0) for domain in weights}
    top = max(excess.values())  # taken off before the exponential, which would overflow above 709
    raised = {domain: weight * math.exp(excess[domain] - top) for domain, weight in weights.items()}
    total = sum(raised.values())
    if not (total > 0 and math.isfinite(total)):
        raise ValueError(f"weights {dict(weights)} must be finite, not negative and have a positive sum")
    return {domain: value / total for domain, value in raised.items()}


def quantise(weights: Mapping[str, float] | Iterable[float]) -> list[int]:
    """Weights as integers that sum to 2**32 (largest remainders get what rounding leaves); 0 stays 0.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0.
    """
    values = list(weights.values() if isinstance(weights, Mapping) else weights)
    total = math.fsum(values) if all(math.isfinite(v) and v >= 0 for v in values) else 0.0
    if not (total > 0 and math.isfinite(total)):
        raise ValueError(f"weights {values} must be finite, not negative and have a positive sum")
    exact = [value / total * ONE for value in values]
    whole = [int(value) for value in exact]
    order = sorted(range(len(values)), key=lambda i: (whole[i] - exact[i], i))
    order = [i for i in order if values[i] > 0]
    left = ONE - sum(whole)
    for place in range(abs(left)):  # rounding of the quotients can also leave one too many
        whole[order[place % len(order)]] += 1 if left > 0 else -1
    return whole
