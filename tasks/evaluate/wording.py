"""How figures with their errors are written in tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping


def signed(delta: Mapping[str, float]) -> str:
    """A difference {loss, stderr} with its standard error, if it has one: −0.163 ± 0.004."""
    error = f" ± {delta['stderr']:.3f}" if "stderr" in delta else ""
    return f"{delta['loss']:+.3f}{error}".replace("-", "−")
