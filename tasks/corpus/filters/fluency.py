"""Fluency by the frequencies of words: OCR faults, mojibake, tables, lists of names and code have rare ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

from tasks.corpus.filters.words import words
from tasks.corpus.records import CorpusError
from tasks.settings.filters import Fluency


def judge(rule: Fluency) -> Callable[[str], str | None]:
    zipf = zipf_of(rule.language)

    def fluency(text: str) -> str | None:
        return "rare_words" if mean_zipf(text, zipf) < rule.min_zipf else None

    return fluency


def mean_zipf(text: str, zipf: Mapping[str, float]) -> float:
    """Mean Zipf value of the words that have a letter in them; 0 if there are none."""
    found = [word for word in words(text.lower()) if any(map(str.isalpha, word))]
    return sum(zipf.get(word, 0.0) for word in found) / len(found) if found else 0.0


@cache
def zipf_of(language: str) -> Mapping[str, float]:
    """Words of a language and log10 of their occurrences per 10^9 words, at least 3 (wordfreq's small list)."""
    import wordfreq

    if language not in (known := wordfreq.available_languages("small")):
        raise CorpusError(
            f"filters: rule `fluency`, language = {language!r}: wordfreq has no list of it; it has "
            f"{', '.join(sorted(known))}"
        )
    return {word: math.log10(f) + 9 for word, f in wordfreq.get_frequency_dict(language, "small").items()}
