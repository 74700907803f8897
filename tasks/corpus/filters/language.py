"""The language of a document, by py3langid: a naive Bayes model over byte n-grams, inside its wheel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tasks.corpus.records import CorpusError
from tasks.settings.filters import Language


def judge(rule: Language) -> Callable[[str], str | None]:
    identifier = _identifier()
    if unknown := sorted(set(rule.languages) - set(identifier.labels)):
        raise CorpusError(
            f"filters: rule `language`, languages = {unknown}: py3langid does not know them; it knows "
            f"{', '.join(sorted(identifier.labels))}"
        )
    wanted = frozenset(rule.languages)

    def language(text: str) -> str | None:
        found, score = identifier.classify(text[: rule.chars])
        if found not in wanted:
            return found
        return "uncertain" if score < rule.min_score else None

    return language


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
