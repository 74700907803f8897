"""Words against a reference that goes character by character."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.corpus.dedup import words
from tasks.corpus.records import runs

TEXTS = st.text(
    st.one_of(
        st.sampled_from(
            " \n\tabcXYZ09_-.,'’“é\u0301ßİǅﬁ①½٣ーア東ก\u0e31ह\u093f\U0001d400\U00020000\U000e0100\ud800🙂"
        ),
        st.characters(),
    ),
    max_size=60,
)


UNSPACED = [
    *((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100)),
    *((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32400)),
]


def naive(text: str) -> list[str]:
    result = []
    for char in unicodedata.normalize("NFKC", text):
        code = ord(char)
        if any(first <= code < stop for first, stop in UNSPACED):
            result.append(f" {char} ")
        elif code < 0x20000 and (char.isalnum() or unicodedata.category(char).startswith("M")):
            result.append(next(form for form in (char.casefold(), char.lower(), char) if len(form) == 1))
        else:
            result.append(" ")
    return "".join(result).split(" ")


def of(split: words.Words, i: int) -> list[str]:
    return [split.text(place, 1) for place in range(split.offsets[i], split.offsets[i + 1])]


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=5), st.sampled_from([1, 1 << 18]))
@example([], 1)
@example(["x" * 8, "x" * 9, "x" * 64, "x" * 65, "x" * 64 + "y", "é" * 40], 1)
@example(["é \u0301 a", "é a\u0301 東 b c\u0301d e"], 1)
def test_words_are_those_found_character_by_character_and_equal_ones_alone_have_equal_hashes(
    texts: list[str], piece: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "_BATCH_CHARS", piece)
        split = words.split(texts)
    expected = [[word for word in naive(text) if word] for text in texts]
    assert [of(split, i) for i in range(len(texts))] == expected
    flat = [word for text in expected for word in text]
    assert len(split.hashes) == len(flat)
    assert len(set(zip(flat, split.hashes.tolist(), strict=True))) == len(set(flat)) == len(set(split.hashes.tolist()))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_ngrams_have_equal_hashes_where_their_words_are_equal_and_nowhere_else(n: int) -> None:
    rng = np.random.default_rng(n)
    text = " ".join(rng.choice(["a", "b"], size=400))
    split = words.split([text])
    hashes = words.ngrams(split.hashes, n)
    grams = [split.text(i, n) for i in range(400 - n + 1)]
    assert len(hashes) == len(grams)
    assert len(set(zip(grams, hashes.tolist(), strict=True))) == len(set(grams)) == len(set(hashes.tolist()))


def test_fewer_words_than_n_have_no_ngrams() -> None:
    assert len(words.ngrams(words.split(["one two"]).hashes, 3)) == 0


def test_an_ngram_of_other_length_has_another_hash() -> None:
    hashes = words.split(["a a a a a a a a"]).hashes
    assert len({int(words.ngrams(hashes, n)[0]) for n in range(1, 9)}) == 8


def test_digits_count_as_zeros_if_they_do_not_matter() -> None:
    split = words.split(["On 2024-01-31, v1.5", "on 1999 12 07 v2 0", "on 1999 12 7 v2 0"], digits=False)
    assert of(split, 0) == of(split, 1) == ["on", "0000", "00", "00", "v0", "0"]
    assert of(split, 2) != of(split, 1)


def test_runs_cover_all_items_in_order_and_a_large_one_stands_alone() -> None:
    sizes = [1, 20, 0, 4, 6, 1, 0, 10]
    assert list(runs(sizes, most=10)) == [(0, 1), (1, 2), (2, 5), (5, 7), (7, 8)]
    assert list(runs([], most=10)) == []
