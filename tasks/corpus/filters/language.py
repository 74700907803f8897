"""The language of a document, by py3langid: a naive Bayes model over byte n-grams, inside its wheel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tasks.corpus.records import CorpusError
from tasks.settings.filters import Language


def make_filter(rule: Language) -> Callable[[str], str | None]:
    identifier = _identifier(None if rule.among is None else tuple(rule.among))
    if unknown := sorted(set(rule.languages) - set(identifier.labels)):
        raise CorpusError(
            f"filters: rule `language`, languages = {unknown}: not told apart; the languages that are: "
            f"{', '.join(sorted(identifier.labels))}"
        )
    wanted = frozenset(rule.languages)

    def language(text: str) -> str | None:
        likeliest, score = identifier.classify(text[: rule.chars])
        if score < rule.min_score:
            return "uncertain"
        return None if likeliest in wanted else str(likeliest)

    return language


@cache
def _identifier(among: tuple[str, ...] | None) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    try:
        identifier.set_languages(among)
    except ValueError as error:
        raise CorpusError(
            f"filters: rule `language`, among = {list(among or ())}: {error}; known: {', '.join(identifier.labels)}"
        ) from None
    return identifier
