"""datatrove's rules give the verdicts of datatrove itself, called with the same splitter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import datatrove.data
import pytest
from datatrove.pipeline import filters as theirs
from datatrove.utils.word_tokenizers import WordTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.filters.chain import build
from tasks.corpus.filters.splitter import sentence_spans, words
from tasks.settings import filters as rules
from tests.corpus.filters.samples import PROSE, document


class Words(WordTokenizer):
    def word_tokenize(self, text: str) -> list[str]:
        return words(text)

    def sent_tokenize(self, text: str) -> list[str]:
        raise AssertionError("the filters take spans")

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return sentence_spans(text)


PAIRS: dict[str, tuple[rules.Filter, Any]] = {
    "gopher_quality": (rules.GopherQuality(rule="gopher_quality"), theirs.GopherQualityFilter),
    "gopher_repetition": (rules.GopherRepetition(rule="gopher_repetition"), theirs.GopherRepetitionFilter),
    "c4_quality": (rules.C4Quality(rule="c4_quality"), theirs.C4QualityFilter),
    "fineweb_quality": (rules.FineWebQuality(rule="fineweb_quality"), theirs.FineWebQualityFilter),
}
LINES = st.lists(
    st.one_of(
        st.sampled_from(
            ["The cat sat with the dog and that was it.", "- a", "# # #", "…", "{", "Use javascript.", ""]
        ),
        st.text(max_size=30),
    ),
    max_size=25,
).map("\n".join)


def plain(verdict: bool | tuple[bool, str], rule: str) -> str | None:
    return None if verdict is True else f"{rule}.{verdict[1].removeprefix('gopher_')}"  # type: ignore[index]


@pytest.mark.parametrize("rule", PAIRS)
def test_the_verdict_on_real_text_is_datatroves_with_its_own_defaults(rule: str) -> None:
    setting, kind = PAIRS[rule]
    verdict, direct = build([setting]), kind(language=Words())
    result = [verdict(document(text)) for text in PROSE]
    assert result == [plain(direct.filter(datatrove.data.Document(text=text, id="")), rule) for text in PROSE]
    assert None in result
    assert len(set(result)) > 1


@pytest.mark.parametrize("rule", PAIRS)
@settings(max_examples=40, deadline=None)
@given(text=LINES)
def test_any_text_has_a_verdict_and_it_is_datatroves(rule: str, text: str) -> None:
    setting, kind = PAIRS[rule]
    direct = kind(language=Words()).filter(datatrove.data.Document(text=text, id=""))
    assert build([setting])(document(text)) == plain(direct, rule)


SENTENCE = "The ship had gone and with it the hope that they would be home."
TEXT = "\n".join(f"{SENTENCE[:-1]}, said number {i}." for i in range(20))


@pytest.mark.parametrize(
    ("setting", "text", "verdict"),
    [
        (rules.GopherQuality(rule="gopher_quality", min_doc_words=10), SENTENCE, None),
        (rules.GopherQuality(rule="gopher_quality", max_doc_words=100), TEXT, "gopher_quality.long_doc"),
        (rules.GopherQuality(rule="gopher_quality", max_doc_words=None), "so that the cat " * 26000, None),
        (rules.GopherQuality(rule="gopher_quality", stop_words=["el"]), TEXT, "gopher_quality.enough_stop_words"),
        (rules.GopherRepetition(rule="gopher_repetition"), "buy it " * 50, "gopher_repetition.top_2_gram"),
        (rules.GopherRepetition(rule="gopher_repetition", top_n_grams={}, dup_n_grams={}), "buy it " * 50, None),
        (rules.C4Quality(rule="c4_quality", min_num_sentences=1), SENTENCE, None),
        (rules.C4Quality(rule="c4_quality"), TEXT + "\nAnd { there.", "c4_quality.curly_bracket"),
        (rules.C4Quality(rule="c4_quality", filter_curly_bracket=False), TEXT + "\nAnd { there.", None),
        (rules.FineWebQuality(rule="fineweb_quality"), "Hm.\n" * 9, "fineweb_quality.short_line_ratio"),
    ],
)
def test_each_knob_is_heard(setting: rules.Filter, text: str, verdict: str | None) -> None:
    assert build([setting])(document(text)) == verdict


@pytest.mark.parametrize("rule", PAIRS)
def test_the_defaults_of_the_settings_are_datatroves(rule: str) -> None:
    setting, kind = PAIRS[rule]
    ours, direct = setting.model_dump(exclude={"rule"}), kind()
    for name, value in ours.items():
        attribute = {"short_line_thr": "short_line_threshold"}.get(name, name)
        default = getattr(direct, attribute)
        if name == "stop_words":
            assert value is None
        elif isinstance(value, dict):
            assert tuple(sorted(value.items())) == default
        else:
            assert value == default


def test_a_verdict_does_not_depend_on_the_texts_before_it() -> None:
    texts = [*PROSE[:12], PROSE[0] * 80]
    chain = [setting for setting, _ in PAIRS.values()]
    alone = [build([setting])(document(text)) for text in texts for setting in chain]
    together = [build([setting]) for setting in chain]
    backwards = [verdict(document(text)) for text in reversed(texts) for verdict in reversed(together)]
    assert alone == backwards[::-1]


def test_neither_spacy_nor_nltk_is_imported() -> None:
    code = (
        "import sys; sys.modules['spacy'] = sys.modules['nltk'] = None\n"
        "from tests.corpus.filters.test_heuristics import PAIRS, TEXT, build, document\n"
        "print([build([setting])(document(TEXT)) for setting, _ in PAIRS.values()])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
