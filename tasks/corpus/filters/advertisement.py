"""Advertisements: phrases that sell, prices, numbers to call and links, per 100 words."""

from __future__ import annotations

import re
from collections.abc import Callable

from tasks.settings.filters import Advertisement

_SIGNS = re.compile(r"free shipping|click here|buy now|order now", re.IGNORECASE)


def judge(rule: Advertisement) -> Callable[[str], str | None]:
    def advertisement(text: str) -> str | None:
        hits = sum(1 for _ in _SIGNS.finditer(text))
        return (
            "too_many_signs"
            if hits >= rule.min_hits and 100 * hits > rule.max_per_100_words * len(text.split())
            else None
        )

    return advertisement
