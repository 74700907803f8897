"""How figures with their errors are written in tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping


def signed(delta: Mapping[str, float]) -> str:
    """A difference {loss, stderr} with its standard error, if it has one: −0.163 ± 0.004."""
    error = f" ± {delta['stderr']:.3f}" if "stderr" in delta else ""
    return f"{delta['loss']:+.3f}{error}".replace("-", "−")


def verdict(delta: Mapping[str, float], *, rival: str) -> str:
    """Who is better by a difference of losses, the trained model's minus its rival's; nobody within two errors."""
    if abs(delta["loss"]) <= 2 * delta.get("stderr", 0.0):
        return "neither is better by two standard errors"
    return "the Mixture-of-Experts is better" if delta["loss"] < 0 else f"the {rival} is better"
