"""Advertisements in English: prices, numbers to call and phrases that sell, by the hundred words.

No list of products, only what sellers of anything write. Links and the footers of mailing lists do not count: texts
that sell nothing have as many. A report on prices has one kind of sign, an advertisement several.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from tasks.settings.filters import Advertisement

_NUMBER = r"\d[\d,.]{0,12}"
_KINDS = {
    "price": rf"[$£€] ?{_NUMBER}|{_NUMBER} ?(?:dollars|euros|usd|eur|gbp|€|£)",
    "reduction": r"(?:\d{1,3} ?%|percent|half) (?:off|discount)\b|save (?:up to )?(?:\d{1,3} ?%|[$£€])|half[- ]price\b"
    r"|discount(?:s|ed)?\b|bargains?\b|clearance sale\b|coupons?\b|promo(?:tion(?:al)?)? codes?\b|gift cards?\b",
    "phone": r"(?:call|phone|tel|fax|dial|text)\b[^\n]{0,20}?\+?\(?\d[\d() .-]{6,20}\d"
    r"|(?:1[-. ]?)?\(?8(?:00|77|88|66)\)?[-. ]\d{3}[-. ]?\d{4}\b",
    "link": r"(?:click|tap) (?:here|below|on the|this|the link)\b|visit (?:us\b|our\b|https?:|www\.)"
    r"|go to (?:our\b|https?:|www\.)",
    "action": r"(?:buy|order|shop|call|act|apply|join|register|subscribe|sign up|start|enroll|book|reply|respond)"
    r"(?: \w++){0,2} (?:now|today|online|immediately)\b|(?:buy|order) (?:yours|direct)\b|to (?:order|buy)[:,]"
    r"|add to (?:cart|basket|bag)\b|don['’]?t (?:miss|delay|wait)\b|act fast\b|hurry\b",
    "free": r"free (?:shipping|delivery|trial|gift|sample|quote|consultation|offer|bonus|membership|report|info"
    r"|catalog|estimate)|(?:absolutely|totally|100 ?%|completely) free\b|risk[- ]free\b"
    r"|no (?:obligation|purchase necessary|credit check|hidden (?:fees|costs))\b",
    "guarantee": r"money[- ]back\b|(?:satisfaction|100 ?%|fully) guarantee",
    "offer": r"(?:limited|special|exclusive|introductory|amazing|incredible|great|once[- ]in[- ]a[- ]lifetime)[- ]"
    r"(?:time|supply|quantities|offer|deal|price|savings|opportunity)|while (?:supplies|stocks?) lasts?\b"
    r"|(?:best|low(?:est)?|unbeatable|wholesale|affordable|factory) (?:prices?|rates?|deals?)\b"
    r"|best[- ]?sell(?:er|ing)|(?:offer|sale) (?:ends|expires|valid)\b|congratulations\b|claim your\b"
    r"|you(?:['’]ve| have)? (?:won|been (?:selected|chosen))\b",
    "gain": r"(?:earn|make) (?:up to |over )?(?:extra |big |serious |more )?(?:money|cash|\$ ?\d)"
    r"|extra (?:income|cash)\b|work (?:from|at) home\b|financial (?:freedom|independence)\b|be your own boss\b"
    r"|home[- ]based business\b|lose weight\b|weight loss\b|get rich\b|refinanc|mortgage rates?\b|casino\b",
}
_SIGN = re.compile(rf"(?<!\w)(?:{'|'.join(f'(?P<{kind}>{pattern})' for kind, pattern in _KINDS.items())})")


def make_filter(rule: Advertisement) -> Callable[[str], str | None]:
    def advertisement(text: str) -> str | None:
        counts = signs(text)
        dense = 100 * counts.total() > rule.max_per_100_words * len(text.split())
        return "selling" if dense and len(counts) >= rule.min_kinds else None

    return advertisement


def signs(text: str) -> Counter[str | None]:
    """How many signs of each kind a text has, kinds without any left out."""
    return Counter(match.lastgroup for match in _SIGN.finditer(text.lower()))
