"""How losses move domain weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

SMOOTHING = 1e-4
Rule = Literal["paper", "code"]


def update(
    weights: Mapping[str, float],
    *,
    losses: Mapping[str, float],
    references: Mapping[str, float],
    rule: Rule = "paper",
) -> dict[str, float]:
    """One step of dynamic batch loading (Sheared-LLaMA, arXiv 2310.06694, algorithm 1), in double precision.

    paper: w <- w exp(max(loss - reference, 0)), normalised: domains above their reference loss are drawn more. A
        weight of 0 stays 0.
    code: w <- (1 - c) softmax(ln w + loss - reference) + c / k, c = 1e-4, normalised, over k domains: domains below
        their reference are drawn less, and none less than c / k. So a weight of 0 becomes c / k. As
        princeton-nlp/LLM-Shearing and pjlab-sys4nlp/llama-moe do it in single precision.

    Args:
        weights: the weights in use, per domain; they need not sum to 1.
        losses: validation loss now, nats per token.
        references: the loss each domain is to reach.
        rule: which.

    Raises:
        ValueError: a domain is missing, or a number isn't finite.
    """
    for name, values in (("losses", losses), ("references", references)):
        bad = [d for d in weights if not math.isfinite(values.get(d, math.nan))]
        if bad:
            raise ValueError(f"{name}: no finite number for {', '.join(bad)}; found {dict(values)}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights {dict(weights)} must be finite, not negative and have a positive sum")
    excess = {domain: losses[domain] - references[domain] for domain in weights}
    if rule == "paper":
        excess = {domain: max(value, 0.0) for domain, value in excess.items()}
    top = max(excess[domain] for domain, weight in weights.items() if weight)
    # taken off before the exponential, which would overflow above 709
    raised = {d: weight * math.exp(excess[d] - top) if weight else 0.0 for d, weight in weights.items()}
    total = math.fsum(raised.values())
    new = {domain: value / total for domain, value in raised.items()}
    if rule == "code":
        new = {domain: (1 - SMOOTHING) * value + SMOOTHING / len(new) for domain, value in new.items()}
        total = math.fsum(new.values())
        new = {domain: value / total for domain, value in new.items()}
    return new


def within(weights: Mapping[str, float], *, start: Mapping[str, float], factor: float) -> dict[str, float]:
    """The weights scaled to sum 1, each held between a `factor`-th and `factor` times its share of `start`.

    The scale is the same for all that are not held: the proportions between those stay.

    Args:
        weights: sum 1.
        start: sum 1, over the same domains; a share of 0 stays 0.
        factor: 1 or more.
    """

    def held(scale: float) -> dict[str, float]:
        # 1e-300: what underflowed to 0 must be able to rise
        return {d: min(max(scale * max(weights[d], 1e-300), start[d] / factor), start[d] * factor) for d in weights}

    low, high = 0.0, 1.0
    while math.fsum(held(high).values()) < 1 and high < 1e300:
        high *= 2
    for _ in range(200):  # the sum grows with the scale; the loop ends at neighbouring doubles
        middle = (low + high) / 2
        low, high = (middle, high) if math.fsum(held(middle).values()) < 1 else (low, middle)
    found = held(high)
    total = math.fsum(found.values())
    return {domain: weight / total for domain, weight in found.items()}
