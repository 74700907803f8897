"""The language filter tells languages apart, and says which one it found."""

from __future__ import annotations

import pytest

from tasks.corpus.filters.chain import build
from tasks.corpus.records import CorpusError
from tasks.settings.filters import Language
from tests.corpus.filters.samples import PROSE, document

TEXTS = {  # article 1 of the Universal Declaration of Human Rights
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
    "conscience and should act towards one another in a spirit of brotherhood.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt "
    "und sollen einander im Geist der Brüderlichkeit begegnen.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и "
    "должны поступать в отношении друг друга в духе братства.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق، وقد وهبوا عقلا وضميرا "
    "وعليهم أن يعامل بعضهم بعضا بروح الإخاء.",
}


def rule(*languages: str, among: list[str] | None = None, min_score: float = 0.5, chars: int = 2000) -> Language:
    return Language(rule="language", languages=list(languages), among=among, min_score=min_score, chars=chars)


@pytest.mark.parametrize("language", TEXTS)
def test_a_text_passes_as_its_own_language_and_is_counted_under_it_elsewhere(language: str) -> None:
    other = "en" if language != "en" else "de"
    assert build([rule(language)])(document(TEXTS[language])) is None
    assert build([rule(other)])(document(TEXTS[language])) == f"language.{language}"
    assert build([rule(other, language)])(document(TEXTS[language])) is None


def test_english_manuals_are_english() -> None:
    verdict = build([rule("en")])
    assert [text[:60] for text in PROSE if verdict(document(text)) is not None] == []


@pytest.mark.parametrize("text", ["", "   ", "1 2 3", "ok"])
def test_a_text_that_is_too_little_to_tell_is_uncertain(text: str) -> None:
    assert build([rule("en", min_score=0.9)])(document(text)) == "language.uncertain"


def test_only_the_first_characters_are_looked_at() -> None:
    text = TEXTS["de"] + TEXTS["ru"] * 50
    assert build([rule("de", chars=len(TEXTS["de"]))])(document(text)) is None
    assert build([rule("de", chars=len(text))])(document(text)) == "language.ru"


def test_languages_that_are_not_told_apart_cannot_be_found() -> None:
    assert build([rule("en", among=["en", "fr"])])(document(TEXTS["es"])) == "language.fr"
    assert build([rule("en")])(document(TEXTS["es"])) == "language.es"  # the restriction is that filter's own


def test_a_language_that_the_model_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(CorpusError, match=r"languages = \['english'\].*not told apart.* de, .* en, "):
        build([rule("english")])
    with pytest.raises(CorpusError, match=r"languages = \['de'\].*not told apart.* en, fr"):
        build([rule("de", among=["en", "fr"])])
    with pytest.raises(CorpusError, match=r"among = \['english'\].*Unknown language code"):
        build([rule("en", among=["english"])])
