"""A chain of filters names the first rule that drops a document; settings that cannot work say so."""

from __future__ import annotations

import sys
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from tasks.corpus.filters.chain import FILTERS, build
from tasks.corpus.records import CorpusError
from tasks.settings import filters as rules
from tests.corpus.filters.samples import PROSE, document

SETTINGS: TypeAdapter[list[rules.Filter]] = TypeAdapter(list[rules.Filter])


def chain(*raw: dict[str, Any]) -> Any:
    return build(SETTINGS.validate_python(raw))


def test_no_filters_keep_everything() -> None:
    assert chain()(document("")) is None


def test_the_first_filter_that_drops_a_document_gives_the_reason() -> None:
    verdict = chain({"rule": "length", "min_chars": 5}, {"rule": "length", "min_chars": 3, "max_chars": 8})
    result = {text: verdict(document(text)) for text in ("ab", "abcd", "abcdef", "abcdefghi")}
    assert result == {
        "ab": "length.too_short",
        "abcd": "length.too_short",
        "abcdef": None,
        "abcdefghi": "length.too_long",
    }


def test_every_model_of_the_settings_has_a_filter() -> None:
    assert set(get_args(get_args(rules.Filter)[0])) == set(FILTERS)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rule": "lenth"}, "'lenth' found using 'rule' does not match any of the expected tags: 'length'"),
        ({"min_chars": 3}, "Unable to extract tag using discriminator 'rule'"),
        ({"rule": "length", "min_char": 3}, "Extra inputs are not permitted"),
        ({"rule": "length", "min_chars": 9, "max_chars": 3}, "max_chars = 3 is less than min_chars = 9"),
        ({"rule": "gopher_quality", "max_bullet_lines_ratio": 0.0}, "greater than 0"),
        ({"rule": "gopher_repetition", "top_n_grams": {0: 0.1}}, "greater than 0"),
        ({"rule": "language", "languages": []}, "at least 1 item"),
        ({"rule": "language", "languages": ["en"], "min_score": 1.1}, "less than or equal to 1"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SETTINGS.validate_python([raw])


@pytest.mark.parametrize(
    ("raw", "modules", "package"),
    [
        ({"rule": "c4_quality"}, ["datatrove", "datatrove.pipeline", "datatrove.pipeline.filters"], "datatrove"),
        (
            {"rule": "language", "languages": ["ha"], "among": ["ha", "yo"]},
            ["py3langid", "py3langid.langid"],
            "py3langid",
        ),
        ({"rule": "fluency", "language": "hu"}, ["wordfreq"], "wordfreq"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    raw: dict[str, Any], modules: list[str], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CorpusError, match=rf"filter `{raw['rule']}` needs the package {package}.*moeforge\[filters\]"):
        chain(raw)


def test_the_settings_need_none_of_the_packages() -> None:
    assert chain({"rule": "length"}, {"rule": "advertisement"})(document(PROSE[0])) is None


def test_a_document_of_exactly_the_least_and_the_most_characters_is_kept() -> None:
    verdict = chain({"rule": "length", "min_chars": 3, "max_chars": 5})
    found = [verdict(document("x" * count)) for count in (2, 3, 5, 6)]
    assert found == ["length.too_short", None, None, "length.too_long"]
