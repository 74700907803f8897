"""Fluency keeps prose and drops what each of its measures is for."""

from __future__ import annotations

import base64
import random

import pytest

from tasks.corpus.filters.chain import build
from tasks.corpus.filters.fluency import measure, zipf_of
from tasks.corpus.records import CorpusError
from tasks.settings.filters import Fluency
from tests.corpus.filters.samples import PROSE, document

RULE = Fluency(rule="fluency")
LICENCE = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated "
    "documentation files, to deal in the software without restriction, including without limitation the rights to "
    "use, copy, modify, merge, publish, distribute and sell copies of the software, and to permit those to whom the "
    "software is furnished to do so, subject to the following conditions. The above copyright notice and this "
    "permission notice shall be included in all copies or substantial portions of the software. The software is "
    "provided as it is, without warranty of any kind. In no event shall the authors be liable for any claim."
)


def verdict(text: str, rule: Fluency = RULE) -> str | None:
    return build([rule])(document(text))


def test_prose_is_fluent() -> None:
    assert verdict(LICENCE) is None


def test_chapters_of_a_manual_are_fluent_but_for_those_on_words_like_with() -> None:
    """ "The with statement" is a fault of order to this filter."""
    dropped = [text for text in PROSE if verdict(text) is not None]
    assert len(dropped) < 0.1 * len(PROSE)
    assert any(text.startswith('The "with" statement') for text in dropped)


def test_shuffled_words_have_misplaced_articles() -> None:
    words = (LICENCE * 3).split()
    random.Random(0).shuffle(words)
    assert verdict(" ".join(words)) == "fluency.misplaced_articles"


def test_one_misplaced_article_is_a_slip() -> None:
    assert verdict("He went to the of and then home with all that they had.") is None
    assert verdict("He went to the of and then the is home with all that they had.") == "fluency.misplaced_articles"


def test_keywords_have_few_function_words() -> None:
    words = list(zipf_of("en"))[300:3000]
    text = ", ".join(random.Random(0).sample(words, 200))
    assert verdict(text) == "fluency.few_function_words"


@pytest.mark.parametrize(
    "text",
    [
        base64.encodebytes(LICENCE.encode()).decode(),
        LICENCE[::-1],
        LICENCE.replace(" ", ""),
        "Zażółć gęślą jaźń, pchnąć w tę łódź jeża lub ośm skrzyń fig.",
        "1 2 3 4",
        "",
    ],
)
def test_what_is_not_words_of_the_language_has_rare_words(text: str) -> None:
    assert verdict(text) == "fluency.rare_words"


def test_another_language_has_its_own_words() -> None:
    text = (
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt."
    )
    assert verdict(text) == "fluency.rare_words"
    assert verdict(text, Fluency(rule="fluency", language="de")) is None


def test_the_measures_of_a_short_text_are_those_counted_by_hand() -> None:
    zipf = {"the": 7.0, "cat": 4.0, "isn't": 5.0}
    result = measure("The cat isn’t the THE zzz 42!", zipf)
    assert (result.words, result.misplaced) == (6, 1)
    assert result.zipf == pytest.approx((7 + 4 + 5 + 7 + 7 + 0) / 6)
    assert result.function_words == pytest.approx(5 / 6)


@pytest.mark.parametrize("language", ["zh", "xx", "english"])
def test_a_language_without_a_list_of_divided_words_is_refused(language: str) -> None:
    with pytest.raises(CorpusError, match=f"language = '{language}': no list of words.*de, .*en, "):
        build([Fluency(rule="fluency", language=language)])
