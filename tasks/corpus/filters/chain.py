"""Filters: which documents a domain drops, and why.

    build([Length(rule="length", min_chars=200), …])(document)    # None, or "length.too_short"

A filter is a model in tasks/settings/filters.py and a function here, from the model to a judge of texts. A judge is a
pure function of the text. docs/filters.md describes all of them and how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tasks.corpus.filters import advertisement, fluency, heuristics, language, length
from tasks.corpus.records import CorpusError, Document
from tasks.settings import filters as rules

Judge = Callable[[str], str | None]
"""A text -> None to keep it, or the reason to drop it."""

JUDGES: dict[type[rules.Frozen], Callable[[Any], Judge]] = {
    rules.Length: length.judge,
    rules.GopherQuality: heuristics.gopher_quality,
    rules.GopherRepetition: heuristics.gopher_repetition,
    rules.C4Quality: heuristics.c4_quality,
    rules.FineWebQuality: heuristics.fineweb_quality,
    rules.Language: language.judge,
    rules.Fluency: fluency.judge,
    rules.Advertisement: advertisement.judge,
}


def build(filters: Sequence[rules.Filter]) -> Callable[[Document], str | None]:
    """The filters as one function: None keeps a document, else `<rule>.<reason>` of the first that drops it.

    Raises CorpusError if a filter needs a package that is not installed, or a setting names what its data lack.
    """
    judges = [(rule.rule, _judge(rule)) for rule in filters]

    def verdict(document: Document) -> str | None:
        for name, judge in judges:
            if (reason := judge(document.text)) is not None:
                return f"{name}.{reason}"
        return None

    return verdict


def _judge(rule: rules.Filter) -> Judge:
    try:
        return JUDGES[type(rule)](rule)
    except ModuleNotFoundError as error:
        raise CorpusError(
            f"filter `{rule.rule}` needs the package {error.name}, which is not here: pip install 'moeforge[filters]'"
        ) from error
