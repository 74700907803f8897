"""Fluency: are these the running words of a language?

Three measures, each of which another kind of text fails: the frequencies of the words (OCR faults, mojibake, encoded
data), the share of function words (lists of keywords and names), and English articles before words that cannot follow
one (shuffled words). No measure is a language model: well-formed nonsense passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice, pairwise

import regex

from tasks.corpus.records import CorpusError
from tasks.settings.filters import Fluency

_WORD = regex.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_FUNCTION_WORDS = 50
_UNSPACED = {"ja", "ko", "zh"}
_ARTICLES = frozenset(("the", "a", "an"))
_NEVER_AFTER_ARTICLES = _ARTICLES | {
    *("of", "to", "and", "in", "is", "was", "that", "it", "for", "with", "on", "as", "at", "by", "be", "are", "from"),
    *("or", "i", "he", "not", "but", "they", "have", "had", "you", "we", "his", "were", "this", "which", "would"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Of one text: mean Zipf value (log10 of occurrences per 10^9 words), share of function words, faults of order."""

    words: int
    zipf: float
    function_words: float
    misplaced: int


def make_filter(rule: Fluency) -> Callable[[str], str | None]:
    zipf = zipf_of(rule.language)

    def fluency(text: str) -> str | None:
        measures = measure(text, zipf)
        if measures.zipf < rule.min_zipf:
            return "rare_words"
        if measures.function_words < rule.min_function_words:
            return "few_function_words"
        if rule.language == "en" and measures.misplaced > max(1, rule.max_misplaced * measures.words):
            return "misplaced_articles"
        return None

    return fluency


def measure(text: str, zipf: dict[str, float]) -> Measures:
    """The measures of a text by a list of words, commonest first; all 0 if it has no words."""
    words = _WORD.findall(text.lower().replace("’", "'"))
    common = frozenset(islice(zipf, _FUNCTION_WORDS))
    count = len(words) or 1
    return Measures(
        words=len(words),
        zipf=sum(zipf.get(word, 0.0) for word in words) / count,
        function_words=sum(word in common for word in words) / count,
        misplaced=sum(a in _ARTICLES and b in _NEVER_AFTER_ARTICLES for a, b in pairwise(words)),
    )


@cache
def zipf_of(language: str) -> dict[str, float]:
    """Words of a language, commonest first, and their Zipf values, 3 and more (wordfreq's small list)."""
    import wordfreq

    known = wordfreq.available_languages("small").keys() - _UNSPACED
    if language not in known:
        raise CorpusError(
            f"filters: rule `fluency`, language = {language!r}: no list of words that spaces divide; there is one of "
            f"{', '.join(sorted(known))}"
        )
    return {word: math.log10(share) + 9 for word, share in wordfreq.get_frequency_dict(language, "small").items()}
