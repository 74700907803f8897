"""Signatures against the true Jaccard similarity, against datasketch, and against what they were."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from datasketch import MinHash, MinHashLSH

from tasks.corpus.dedup import duplicates, minhash, words
from tasks.settings.corpus import NearDuplicates

BANDS, ROWS, NGRAM = 14, 8, 5
TASKS = Path("/proc/self/task")


@pytest.fixture
def signer() -> minhash.Signer:
    return minhash.Signer(BANDS, ROWS, ngram=NGRAM)


def shingles(text: str, ngram: int = NGRAM) -> set[str]:
    """The shingles of a text of lower-case words."""
    split = text.split()
    return {" ".join(split[i : i + ngram]) for i in range(len(split) - ngram + 1)}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def edited(text: str, rng: random.Random, *, edits: int) -> str:
    """A text with some of its words replaced."""
    split = text.split()
    for place in rng.sample(range(len(split)), edits):
        split[place] = f"edit{rng.choice('abcdefgh')}"
    return " ".join(split)


def prose(rng: random.Random, length: int) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=3)) for _ in range(length))


def clusters(n: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """The smallest member of each node's component."""
    smallest = list(range(n))
    for one, other in edges:
        low, high = sorted((smallest[one], smallest[other]))
        smallest = [low if label == high else label for label in smallest]
    return smallest


def decided(texts: list[str], signer: minhash.Signer, folder: Path) -> list[int]:
    bands = signer.bands(texts)
    ids = [xxhash.xxh3_128_digest(text.encode()) for text in texts]
    table = pa.table(
        {
            "doc_id": pa.array(ids, pa.binary(16)),
            "bands": pa.array([row.tobytes() for row in bands], pa.binary(8 * BANDS)),
        }
    )
    with pa.ipc.new_file(folder / "chunk.arrow", table.schema) as writer:
        writer.write_table(table)
    near = NearDuplicates(bands=BANDS, rows=ROWS, ngram=NGRAM)
    return duplicates.decide([folder / "chunk.arrow"], near=near, scratch=folder).first.tolist()


def of_datasketch(signatures: list[MinHash]) -> list[int]:
    lsh = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    for i, signature in enumerate(signatures):
        lsh.insert(i, signature)
    edges = [(i, other) for i, signature in enumerate(signatures) for other in lsh.query(signature)]
    return clusters(len(signatures), edges)


@pytest.mark.parametrize("length", [30, 400])
def test_the_share_of_equal_minima_estimates_the_jaccard_similarity_within_four_sigma(
    signer: minhash.Signer, length: int
) -> None:
    rng = random.Random(length)
    originals = [prose(rng, length) for _ in range(300)]
    others = [edited(text, rng, edits=round(length * rng.uniform(0.005, 0.2))) for text in originals]
    equal = signer.signatures(originals) == signer.signatures(others)
    scores = []
    for one, other, same in zip(originals, others, equal, strict=True):
        true = jaccard(one, other)
        if 0 < true < 1:
            sigma = math.sqrt(true * (1 - true) / (BANDS * ROWS))
            scores.append((same.mean() - true) / sigma)
    assert len(scores) > 200
    assert abs(np.mean(scores)) < 4 / math.sqrt(len(scores))
    assert max(map(abs, scores)) < 4


@pytest.mark.parametrize("length", [100, 300])
def test_documents_meet_as_often_as_the_bands_say(signer: minhash.Signer, length: int) -> None:
    rng = random.Random(length)
    originals = [prose(rng, length) for _ in range(500)]
    others = [edited(text, rng, edits=round(length * rng.uniform(0.01, 0.06))) for text in originals]
    met = (signer.bands(originals) == signer.bands(others)).any(axis=1)
    similarity = np.array([jaccard(*pair) for pair in zip(originals, others, strict=True)])
    chance = 1 - (1 - similarity**ROWS) ** BANDS
    sigma = math.sqrt((chance * (1 - chance)).sum())
    assert 0.2 < chance.mean() < 0.8
    assert abs(met.sum() - chance.sum()) < 4 * sigma


def test_clusters_are_those_of_datasketch_on_the_same_signatures(signer: minhash.Signer, tmp_path: Path) -> None:
    rng = random.Random(7)
    bases = [prose(rng, 120) for _ in range(60)]
    texts = bases + [edited(rng.choice(bases), rng, edits=rng.randint(1, 9)) for _ in range(240)]
    texts = list(dict.fromkeys(texts))
    size = BANDS * ROWS
    same = [MinHash(num_perm=size, hashvalues=row, scheme="affine32") for row in signer.signatures(texts)]
    clusters = decided(texts, signer, tmp_path)
    assert clusters == of_datasketch(same)
    assert len(bases) < len(set(clusters)) < len(texts)  # some meet, some do not


def test_signatures_are_the_same_on_every_machine() -> None:
    text = "The quick brown fox, in 2024, jumps over the lazy dogs of Köln and 東京."
    long = " ".join(str(number) + "abcdefgh"[number % 8] for number in range(5000))
    signer = minhash.Signer(BANDS, ROWS, ngram=NGRAM, digits=False)
    assert signer.bands([text, "short", ""])[:, [0, 13]].tolist() == [
        [10270235596308600311, 8898448642619148363],
        [17726268300080250400, 7463796624110626321],
        [3100981321963217456, 2043915787337036557],
    ]
    assert xxhash.xxh3_64_hexdigest(signer.bands([text, long]).astype("<u8").tobytes()) == "dd0f3a4337264084"


def test_a_text_has_the_same_bands_in_any_company(signer: minhash.Signer) -> None:
    rng = random.Random(3)
    texts = ["", "a", "!", "é b c d", *(prose(rng, length) for length in (4, 5, 6, 300, 70_000, 2))]
    together = signer.bands(texts)
    assert together.shape == (len(texts), BANDS)
    assert signer.bands([]).shape == (0, BANDS)
    assert together.dtype == np.uint64
    for i in range(len(texts)):
        assert (signer.bands(texts[i : i + 1]) == together[i]).all()
        assert (signer.bands(texts[i:]) == together[i:]).all()


@pytest.mark.skipif(not TASKS.exists(), reason="the kernel does not list threads")
def test_no_thread_is_started(signer: minhash.Signer) -> None:
    before = len(list(TASKS.iterdir()))
    signer.bands([f"document {i} of very many short ones that come at once" for i in range(5000)])
    assert len(list(TASKS.iterdir())) == before


def test_case_punctuation_and_space_do_not_matter_and_digits_do_unless_they_are_not_to(signer: minhash.Signer) -> None:
    texts = [
        "On 2023-11-05 the Court\nruled: “it’s void”.",
        "on 2023 11 05 the court ruled it s void",
        "on 1999 10 31 the court ruled it s void",
    ]
    one, same, other = signer.bands(texts)
    assert (one == same).all()
    assert not (one == other).any()
    one, same, other = minhash.Signer(BANDS, ROWS, ngram=NGRAM, digits=False).bands(texts)
    assert (one == same).all()
    assert (one == other).all()


def test_documents_that_are_to_be_alone_meet_none() -> None:
    ids = [xxhash.xxh3_128_digest(str(i).encode()) for i in range(1000)]
    bands = minhash.alone(ids, BANDS)
    assert len(np.unique(bands)) == 1000 * BANDS
    assert (minhash.alone(ids[5:6], BANDS) == bands[5]).all()
    assert minhash.alone([], BANDS).shape == (0, BANDS)


def test_texts_shorter_than_a_shingle_meet_where_their_words_are_equal_and_nowhere_else(
    signer: minhash.Signer,
) -> None:
    texts = ["one", "One!", "one two", "two one", "one two three four", "", "...", "?"]
    meet = defaultdict(set)
    for i, j in itertools.product(range(len(texts)), repeat=2):
        if (signer.bands([texts[i]]) == signer.bands([texts[j]])).any():
            meet[i].add(j)
    assert meet == {0: {0, 1}, 1: {0, 1}} | {i: {i} for i in range(2, len(texts))}


@pytest.mark.parametrize("change", [str.upper, lambda text: text.replace(" ", "\n")])
def test_shingles_are_the_word_ngrams(signer: minhash.Signer, change: Callable[[str], str]) -> None:
    rng = random.Random(5)
    texts = [" ".join(rng.choices("abc", k=length)) for length in range(5, 60)]
    hashes, offsets = signer.shingles([change(text) for text in texts])
    assert offsets.tolist() == [0, *itertools.accumulate(len(text.split()) - NGRAM + 1 for text in texts)]
    whole = {
        " ".join(gram): int(words.ngrams(words.split([" ".join(gram)]).hashes, NGRAM)[0])
        for gram in itertools.product("abc", repeat=NGRAM)
    }
    for text, start, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
        assert set(hashes[int(start) : int(end)].tolist()) == {whole[shingle] for shingle in shingles(text)}
