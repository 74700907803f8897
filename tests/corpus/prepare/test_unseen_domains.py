"""Domains on which the result is judged and nothing else: all of their documents are test text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tasks.corpus import manifest
from tasks.corpus.records import CorpusError
from tasks.corpus.sampling import windows
from tasks.partition import calibration
from tasks.tools import inspect_corpus, verify_corpus
from tests.corpus.texts import WORDS, Project, jsonl, run, sentences, texts_of


def test_an_unseen_domain_is_test_text_alone_and_no_reader_of_training_text_meets_it(
    project: Project, tmp_path: Path
) -> None:
    prose, talk = sentences(200, seed=1), sentences(12, seed=2)
    corpus = project({"talk": {"source": jsonl(tmp_path / "talk.jsonl", talk), "unseen": True}, "prose": prose})
    metrics = run()
    assert sorted(texts_of(corpus, "talk", "test")) == sorted(talk)
    assert not any(texts_of(corpus, "talk", split) for split in ("train", "validation"))
    assert all(texts_of(corpus, "prose", split) for split in manifest.SPLITS)
    made = manifest.load(corpus)
    assert (list(made.trained), list(made.unseen), list(made.domains)) == (["prose"], ["talk"], ["prose", "talk"])
    assert metrics["domains"]["talk"]["unseen"]
    assert "unseen" not in metrics["domains"]["prose"]
    assert list(windows.unseen(corpus, seq_len=32, count=3)) == ["talk"]
    assert windows.unseen(corpus, seq_len=32, count=3)["talk"].shape == (3, 32)
    for others in (windows.validation, windows.test):
        assert list(others(corpus, seq_len=32, count=3)) == ["prose"]
    _, slots = calibration.draw(corpus, seq_len=32, count=40, seed=0)
    assert {domain for domain, _ in slots} == {"prose"}
    assert list(verify_corpus.problems(corpus)) == []
    assert inspect_corpus.describe_manifest(corpus)["domains"]["talk"]["first_text"]
    with pytest.raises(ValueError, match="the test part of talk is shorter than one window"):
        windows.require(corpus, "test", seq_len=metrics["domains"]["talk"]["tokens"]["test"] + 1)


@pytest.mark.parametrize("action", ["drop", "group"])
@pytest.mark.parametrize("first", ["prose", "talk"])
def test_nothing_in_an_unseen_domain_is_like_what_is_trained_on(
    project: Project, tmp_path: Path, first: str, action: str
) -> None:
    rng = random.Random(12)
    long = [" ".join(rng.choices(WORDS, k=200)) for _ in range(40)]
    near = [text.replace("the ", "The  ", 1) + " indeed" for text in long]
    domains = {
        "prose": {"source": jsonl(tmp_path / "p.jsonl", long + sentences(100, seed=1))},
        "talk": {
            "source": jsonl(tmp_path / "t.jsonl", near + long[:10] + sentences(9, seed=2)),
            "unseen": True,
        },
    }
    corpus = project(
        {name: domains[name] for name in sorted(domains, key=first.__ne__)}, near_duplicates={"action": action}
    )
    run()
    trained = {text for split in ("train", "validation") for text in texts_of(corpus, "prose", split)}
    judged = set(texts_of(corpus, "talk", "test"))
    assert judged >= set(sentences(9, seed=2))
    originals = {text.removesuffix(" indeed").replace("The  ", "the ", 1) for text in judged}
    assert not originals & trained
    if first == "prose":
        assert not originals & set(long)  # the trained domain keeps its own
        assert trained & set(long)
        assert manifest.load(corpus).domains["talk"].rules["near_duplicate"] == 40
    else:
        assert originals >= set(long)
        assert not trained & set(long)


def test_a_corpus_without_unseen_domains_has_the_manifest_of_before(project: Project) -> None:
    corpus = project({"prose": sentences(60, seed=1)})
    run()
    assert "unseen" not in json.loads((corpus / manifest.FILE).read_text())["domains"]["prose"]


def test_one_text_file_is_enough_for_an_unseen_domain_and_none_that_is_kept_is_an_error(
    project: Project, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("Only this. " * 30)
    talk = {"source": f"dir:{tmp_path}/one.txt", "format": "text", "unseen": True}
    corpus = project({"prose": sentences(60, seed=1), "talk": talk})
    run()
    assert len(texts_of(corpus, "talk", "test")) == 1
    shared = sentences(60, seed=1)
    project({"prose": shared, "talk": {"source": jsonl(tmp_path / "t.jsonl", shared[:5]), "unseen": True}})
    with pytest.raises(CorpusError, match=r"domain talk: no document for the test split .*an earlier domain holds"):
        run()
