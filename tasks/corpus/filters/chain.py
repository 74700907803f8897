"""The filters of a domain as one function.

    build([Length(rule="length", min_chars=200), …])(document)    # None, or "length.too_short"

A filter has a settings model and a function from the model to a TextFilter. One of the core has its model in
tasks/settings/filters.py; one of a plug-in has both in tasks/plugins/NAME/filter.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tasks import plugin
from tasks.corpus.filters import advertisement, fluency, heuristics, language, length
from tasks.corpus.records import CorpusError, Document
from tasks.settings import filters as rules
from tasks.settings.fields import Frozen

TextFilter = Callable[[str], str | None]
"""A text -> None to keep it, or the reason to drop it."""

FILTERS: dict[type[Frozen], Callable[[Any], TextFilter]] = {
    rules.Length: length.make_filter,
    rules.GopherQuality: heuristics.make_filter,
    rules.GopherRepetition: heuristics.make_filter,
    rules.C4Quality: heuristics.make_filter,
    rules.FineWebQuality: heuristics.make_filter,
    rules.Language: language.make_filter,
    rules.Fluency: fluency.make_filter,
    rules.Advertisement: advertisement.make_filter,
    **{module.Rule: module.make_filter for module in plugin.modules("filter").values()},
}


def build(filters: Sequence[rules.Filter]) -> Callable[[Document], str | None]:
    """The filters as one function: None keeps a document, else `<rule>.<reason>` of the first that drops it.

    Raises CorpusError if a filter needs a package that is not installed, or has no data for a setting.
    """
    made = [(rule.rule, _make(rule)) for rule in filters]

    def verdict(document: Document) -> str | None:
        for name, text_filter in made:
            if (reason := text_filter(document.text)) is not None:
                return f"{name}.{reason}"
        return None

    return verdict


def _make(rule: rules.Filter) -> TextFilter:
    try:
        return FILTERS[type(rule)](rule)
    except ModuleNotFoundError as error:
        raise CorpusError(
            f"filter `{rule.rule}` needs the package {error.name}, which is not here: pip install 'moeforge[filters]'"
        ) from error
