"""The splitter decides what thresholds mean, so its splits are written down."""

from __future__ import annotations

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.filters import splitter as module
from tasks.corpus.filters.splitter import sentence_spans, words
from tests.corpus.filters.samples import PROSE

TEXTS = st.text(st.one_of(st.characters(), st.sampled_from(" .,'’-_/@!?\nab1文ไщ")), max_size=80)


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("I don't know, e.g. why.", "I|don|'t|know|,|e.g|.|why|."),
        ("He paid $5.99 (3,000 in all)...", "He|paid|$|5.99|(|3,000|in|all|)|..."),
        ("well-known --- or ---- so", "well|-|known|---|or|----|so"),
        ("http://a.b/c?d=1 me@x.org and/or", "http://a.b/c?d=1|me@x.org|and/or"),
        ("_a_ foo_bar **k ==", "_|a_|foo_bar|*|*|k|=|="),
        ("L’homme n'est pas né.", "L|’homme|n|'est|pas|né|."),
        ("Привет, мир!", "Привет|,|мир|!"),
        ("हिन्दी में है।", "हिन्दी|में|है|।"),
        ("مرحبا بالعالم، كيف؟", "مرحبا|بالعالم|،|كيف|؟"),
        ("안녕하세요 세계.", "안녕하세요|세계|."),
        ("这是test文本。", "这|是|test|文|本|。"),
        ("カタカナ、ひらがな", "カ|タ|カ|ナ|、|ひ|ら|が|な"),
        ("สวัสดี โลก", "ส|ว|ั|ส|ด|ี|โ|ล|ก"),
        ("见https://a.b/文", "见|https://a.b/|文"),
        ("e\u0301te\u0301", "e\u0301te\u0301"),
        ("", ""),
    ],
)
def test_words_are_split_as_written_down(text: str, split: str) -> None:
    assert words(text) == (split.split("|") if split else [])


@settings(deadline=None)
@given(TEXTS)
def test_words_together_are_the_text_without_whitespace(text: str) -> None:
    assert "".join(words(text)) == regex.sub(r"\s", "", text)


@settings(deadline=None)
@given(TEXTS)
def test_both_patterns_split_a_text_in_spaced_scripts_alike(text: str) -> None:
    if not module._HAS_UNSPACED.search(text):
        assert module._WORDS.findall(text) == module._SPACED_WORDS.findall(text)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ('He said "No." Then he left', ['He said "No."', " Then he left"]),
        ("Version 1.2.3 is out... at last.", ["Version 1.2.3 is out...", " at last."]),
        ("这是一。「那是二。」三", ["这是一。", "「那是二。」", "三"]),
        ("यह एक है। वह दो", ["यह एक है।", " वह दो"]),
        ("one. ", ["one."]),
        ("", []),
        (" ", []),
    ],
)
def test_sentences_end_after_their_closing_signs(text: str, sentences: list[str]) -> None:
    assert [text[start:end] for start, end in sentence_spans(text)] == sentences


@settings(deadline=None)
@given(TEXTS)
def test_sentences_follow_each_other_and_leave_out_only_whitespace(text: str) -> None:
    spans = sentence_spans(text)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])][: len(spans)]
    assert not text[spans[-1][1] if spans else 0 :].strip()


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([".", "a.", "'", "http://", ". ", "-", "1,", "_"]), st.sampled_from(["", "x", " x", "文"]))
def test_long_runs_of_signs_take_time_in_proportion(unit: str, end: str) -> None:
    """A pattern that looked twice at them would not end."""
    text = unit * 50_000 + end
    assert "".join(words(text)) == text.replace(" ", "")
    assert sentence_spans(text)[-1][1] <= len(text)


def test_a_chapter_has_the_same_words_line_by_line() -> None:
    for text in PROSE[:20]:
        assert words(text) == [word for line in text.split("\n") for word in words(line)]
