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
_CLASSES: dict[type[Frozen], str] = {
    rules.GopherQuality: "GopherQualityFilter",
    rules.GopherRepetition: "GopherRepetitionFilter",
    rules.C4Quality: "C4QualityFilter",
    rules.FineWebQuality: "FineWebQualityFilter",
}


def make_filter(rule: Frozen) -> Callable[[str], str | None]:
    from datatrove.data import Document
    from datatrove.pipeline import filters
    from datatrove.utils.text import split_into_parts

    knobs = rule.model_dump(exclude={"rule"})
    tables = {name: tuple(sorted(knob.items())) for name, knob in knobs.items() if isinstance(knob, dict)}
    filtering = getattr(filters, _CLASSES[type(rule)])(**{**knobs, **tables}, language=splitter())

    def text_filter(text: str) -> str | None:
        result = filtering.filter(Document(text=text, id=""))
        if len(text) > _LARGE:
            split_into_parts.cache_clear()  # it would hold the words of the last five texts
        return None if result is True else result[1].removeprefix("gopher_")

    return text_filter


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
