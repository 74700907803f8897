"""Documents too short or too long."""

from __future__ import annotations

from collections.abc import Callable

from tasks.settings.filters import Length


def make_filter(rule: Length) -> Callable[[str], str | None]:
    def length(text: str) -> str | None:
        if len(text) < rule.min_chars:
            return "too_short"
        if rule.max_chars is not None and len(text) > rule.max_chars:
            return "too_long"
        return None

    return length
