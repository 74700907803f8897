"""The rules of Gopher, C4 and FineWeb: datatrove's own classes, with our splitter in place of spaCy's.

datatrove takes a WordTokenizer in place of a language's name, and imports neither spaCy nor NLTK then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tasks.corpus.filters.splitter import sentence_spans, words
from tasks.settings import filters as rules
from tasks.settings.fields import Frozen

_LARGE = 1 << 20


def gopher_quality(rule: rules.GopherQuality) -> Callable[[str], str | None]:
    from datatrove.pipeline.filters import GopherQualityFilter

    return _wrapped(GopherQualityFilter(**_knobs(rule), language=splitter()), prefix="gopher_")


def gopher_repetition(rule: rules.GopherRepetition) -> Callable[[str], str | None]:
    from datatrove.pipeline.filters import GopherRepetitionFilter

    knobs = _knobs(rule)
    for name in ("top_n_grams", "dup_n_grams"):
        knobs[name] = tuple(sorted(knobs[name].items()))
    return _wrapped(GopherRepetitionFilter(**knobs, language=splitter()))


def c4_quality(rule: rules.C4Quality) -> Callable[[str], str | None]:
    from datatrove.pipeline.filters import C4QualityFilter

    return _wrapped(C4QualityFilter(**_knobs(rule), language=splitter()))


def fineweb_quality(rule: rules.FineWebQuality) -> Callable[[str], str | None]:
    from datatrove.pipeline.filters import FineWebQualityFilter

    return _wrapped(FineWebQualityFilter(**_knobs(rule), language=splitter()))


@cache
def splitter() -> Any:
    """Our splitter as datatrove's WordTokenizer: one for all filters, since datatrove caches splits by it."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Splitter(WordTokenizer):  # type: ignore[misc]  # datatrove has no types
        def word_tokenize(self, text: str) -> list[str]:
            return words(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[start:end].strip() for start, end in sentence_spans(text)]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return sentence_spans(text)

    return Splitter()


def _knobs(rule: Frozen) -> dict[str, Any]:
    knobs: dict[str, Any] = rule.model_dump(exclude={"rule"})
    return knobs


def _wrapped(filtering: Any, *, prefix: str = "") -> Callable[[str], str | None]:
    from datatrove.data import Document
    from datatrove.utils.text import split_into_parts

    def text_filter(text: str) -> str | None:
        result = filtering.filter(Document(text=text, id=""))
        if len(text) > _LARGE:
            split_into_parts.cache_clear()  # it would hold the words of the last five texts
        return None if result is True else result[1].removeprefix(prefix)

    return text_filter
