"""Work that is unfinished when a setting changes: what the setting does not touch is not done again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks import scratch
from tasks.corpus import manifest
from tasks.corpus.prepare import chunk_store, publishing, scan
from tasks.corpus.records import CorpusError
from tasks.corpus.tokenizer import encoder
from tests.corpus.texts import Project, jsonl, run, sentences

BEFORE = {"near_duplicates": {}, "shard_tokens": 800}


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts documents read (by the first letter of their text) and texts tokenised."""
    counts: Counter[str] = Counter()
    doc_id, encode = scan.doc_id, encoder.Encoder.encode

    def read(text: str) -> bytes:
        counts[f"read {text[0]}"] += 1
        return doc_id(text)

    def encoded(self: encoder.Encoder, texts: list[str]) -> Any:
        counts["encoded"] += len(texts)
        return encode(self, texts)

    monkeypatch.setattr(scan, "doc_id", read)
    monkeypatch.setattr(encoder.Encoder, "encode", encoded)
    return counts


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"a": {"heldout": 0.4}}, {"encoded"}),
        ({"a": {"license": "MIT"}}, set()),
        ({"a": {"near_duplicates": "none"}}, {"encoded"}),
        ({"a": {"filters": [{"rule": "length", "min_chars": 70}]}}, {"read a", "encoded"}),
        ({"heldout": 0.3}, {"encoded"}),
        ({"max_bad": 0.5}, set()),
        ({"seed": 7}, {"encoded"}),
        ({"shard_tokens": 500}, {"encoded"}),
        ({"near_duplicates": {"ngram": 3, "action": "group"}}, {"encoded"}),
        ({"near_duplicates": None}, {"encoded"}),
        ({"max_record_bytes": 2000}, {"read a", "read b", "encoded"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_a_changed_setting_leaves_the_work_that_it_does_not_touch(
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Counter[str],
    change: dict[str, Any],
    again: set[str],
) -> None:
    texts = {name: [f"{name}{text}" for text in sentences(80, seed=i)] for i, name in enumerate("ab")}
    texts["b"] += [f"{text} so" for text in texts["b"][:10]]
    source = jsonl(tmp_path / "a.jsonl", texts["a"])

    def settings(*, a: dict[str, Any], **knobs: Any) -> Path:
        return project({"a": {"source": source, **a}, "b": texts["b"]}, **{**BEFORE, **knobs})

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    settings(a={})
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "publish", killed)  # all is done but for that
        with pytest.raises(KeyboardInterrupt):
            run()
    work.clear()
    corpus = settings(**{"a": {}, **change})
    run()
    continued = scratch.digest(corpus)
    assert {what for what, count in work.items() if count > 1} == again  # one: a tokenizer's probe
    assert not list(Path(".scratch/corpus-tiny").glob("*/"))  # nothing is kept of a corpus that is finished
    shutil.rmtree(corpus)
    run()
    assert scratch.digest(corpus) == continued


def test_a_domain_whose_records_are_bad_fails_after_its_first_tasks(
    project: Project, tmp_path: Path, work: Counter[str]
) -> None:
    wrong = jsonl(tmp_path / "a.jsonl", [f"a{text}" for text in sentences(4000, seed=1)])
    late = jsonl(tmp_path / "b.jsonl", [f"b{text}" for text in sentences(2000, seed=2)])
    with (tmp_path / "b.jsonl").open("a") as file:
        file.writelines(json.dumps({"body": "x" * 100}) + "\n" for _ in range(150))
    domains = {"late": {"source": late}, "wrong": {"source": wrong, "text_field": "body"}}
    corpus = project(domains, task_bytes=20_000, max_bad=0.08)
    with pytest.raises(CorpusError) as error:
        run()
    message = str(error.value)
    assert message.startswith("domain wrong: ")
    assert "records are bad (100.00%), which the rest of the input (7" in message
    assert "missing field: " in message
    assert "the first in a.jsonl, row 0" in message
    assert "no 'body'; the record has 'text'" in message
    examples = Path(message.rpartition("; ")[2].removesuffix(" has examples"))
    assert json.loads(examples.read_text().splitlines()[0])["rule"] == "missing field"
    (folder,) = Path(".scratch/corpus-tiny").glob("*/scan/wrong-*")
    assert 0 < len(list(folder.glob("?????.json"))) < 12  # of 27
    work.clear()
    domains["wrong"]["text_field"] = "text"
    project(domains, task_bytes=20_000, max_bad=0.08)
    run()
    assert work["read b"] == 0  # the other domain's scan stays; 150 bad records at its end were no more than allowed
    assert manifest.load(corpus).domains["late"].rules["bad"] == 150


def test_bad_records_of_one_large_file_stop_its_scan_on_the_way(project: Project, tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"body": "x" * 180}) + "\n" for _ in range(40_000))
    project({"a": {"source": f"dir:{tmp_path}/a.jsonl"}})
    message = r"domain a: \d+ of the first \d+ records are bad .* max_bad allows 0.10%"
    for _ in range(2):  # what was scanned stays, and ends a second run as well
        with pytest.raises(CorpusError, match=message):
            run()
        (folder,) = Path(".scratch/corpus-tiny").glob("*/scan/a-*")
        assert sum(chunk["records"] for chunk in chunk_store.chunk_summaries(folder, 0)) < 30_000


def test_bad_records_at_the_beginning_do_not_fail_a_domain_that_has_few_of_them(
    project: Project, tmp_path: Path
) -> None:
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines("{torn\n" for _ in range(200))
        file.writelines(json.dumps({"text": text}) + "\n" for text in sentences(12_000, seed=1))
    project({"a": {"source": f"dir:{tmp_path}/a.jsonl"}}, max_bad=0.02, task_bytes=50_000)
    assert run()["domains"]["a"]["rules"]["bad"] == 200
