"""Domain weights as the integers that the sampler counts with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

ONE = 1 << 32  # a weight of 1


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
