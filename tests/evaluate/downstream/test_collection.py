"""Where the items of tasks come from: local files by split, versions, and what cannot be had."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tasks import settings, sources
from tasks.evaluate.downstream import collection
from tasks.evaluate.downstream.harness import analogies, inference

ROW = '{"text": "one two three"}'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("items.jsonl").write_text(ROW)
    return tmp_path


def task(name: str = "hellaswag_100", **fields: Any) -> settings.Task:
    return settings.Task.model_validate({"name": name, "source": "dir:items.jsonl"} | fields)


def written(name: str) -> Any:
    return YAML(typ="safe", pure=True).load(Path("work", f"{name}.yaml").read_text())


def test_a_task_of_the_collection_is_pointed_at_files_and_at_no_split_without_one(here: Path) -> None:
    files = {"validation": {"source": "dir:items.jsonl"}}
    collection.prepare([task("piqa", source=None, files=files)], Path("work"))
    content = written("piqa")
    assert content["include"].endswith("lm_eval/tasks/piqa/piqa.yaml")
    assert (content["dataset_path"], content["dataset_name"]) == ("json", None)
    assert content["training_split"] is None
    assert "validation_split" not in content
    (file,) = content["dataset_kwargs"]["data_files"]["validation"]
    assert Path(file).read_text() == ROW


@pytest.mark.parametrize(("end", "builder"), [("tsv", "csv"), ("parquet", "parquet"), ("txt", "text"), ("jl", "json")])
def test_the_ending_of_a_files_name_says_how_it_is_read(here: Path, end: str, builder: str) -> None:
    Path(f"items.{end}").write_text("")
    collection.prepare([task("sst2", source=None, files={"validation": {"source": f"dir:items.{end}"}})], Path("work"))
    assert written("sst2")["dataset_path"] == builder


def test_a_described_task_over_data_of_the_hub_keeps_its_dataset(here: Path) -> None:
    collection.prepare([task("snli", source=None)], Path("work"))
    assert list(written("snli")) == ["include"]


def test_other_bytes_than_those_pinned_are_refused_and_named_when_files_are_looked_at_first(here: Path) -> None:
    wrong = task(sha256="0" * 64)
    with pytest.raises(sources.SourceError, match="not those that were pinned"):
        collection.prepare([wrong], Path("work"))
    found, missing = collection.versions([wrong, task("word_analogies")])
    assert list(found) == ["word_analogies"]
    assert "not those that were pinned" in missing["hellaswag_100"]


def test_a_file_that_is_not_there_is_the_reason_that_a_task_is_missing(here: Path) -> None:
    found, missing = collection.versions([task(source="dir:nowhere.jsonl"), task("piqa", source=None)])
    assert found == {}
    assert list(missing) == ["hellaswag_100"]
    assert missing["hellaswag_100"].startswith("SourceError: source 'dir:nowhere.jsonl'")


def test_a_local_task_without_a_description_is_refused_with_the_known_ones(here: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nosuch\.yaml must describe it; described: .*hellaswag_100"):
        collection.prepare([task("nosuch")], Path("work"))


def test_a_data_set_out_of_reach_is_named_by_the_first_line_of_what_went_wrong(here: Path) -> None:
    asked = task("snli", source=None)
    items = collection.Collection(collection.prepare([asked], Path("work")), tasks=[asked])
    with pytest.raises(collection.UnavailableError, match="stanfordnlp/snli") as error:
        items.load(asked)
    assert "\n" not in str(error.value)


def test_a_hub_out_of_reach_is_waited_for_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def load(names: list[str]) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    items = collection.Collection(collection.prepare([task("snli", source=None)], Path("work")), tasks=[])
    monkeypatch.setattr(items._manager, "load", load)
    with pytest.raises(collection.UnavailableError):
        items.load(task("snli", source=None))
    assert constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("pinned", [False, True])
def test_items_that_change_after_the_first_model_was_judged_are_refused(here: Path, pinned: bool) -> None:
    """An evaluation that was killed goes on with the next model, and all are judged by the same items."""
    file = Path("items.jsonl")
    one = task(sha256=sources.fetch("dir:items.jsonl", collection.CACHE).digest() if pinned else None)
    versions, _ = collection.versions([one])
    collection.prepare([one], Path("work"), versions=versions)
    before = file.stat()
    file.write_text(ROW.replace("two", "six"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert pinned or collection.versions([one])[0] != versions
    with pytest.raises(sources.SourceError, match="sha256 is" if pinned else "items.jsonl changed since"):
        collection.prepare([one], Path("work"), versions=versions)


def test_pairs_of_sentences_have_one_shape_whether_from_the_hub_or_from_a_file() -> None:
    file = {"gold_label": "contradiction", "sentence1": "A man sleeps.", "sentence2": "He runs."}
    hub = {"label": 2, "premise": "A man sleeps.", "hypothesis": "He runs."}
    assert inference.process_doc(file) == inference.process_doc(hub) == hub
    assert inference.process_doc(file | {"gold_label": "-"})["label"] == -1


def test_the_choices_of_an_analogy_are_answers_of_its_kind_without_the_words_of_the_question() -> None:
    from datasets import Dataset

    kinds = [
        [
            [f"{kind}{i}", f"{kind.upper()}{i}", f"{kind}{j}", f"{kind.upper()}{j}"]
            for i in range(6)
            for j in range(6)
            if i != j
        ]
        for kind in "ab"
    ]
    lines = [line for kind in kinds for line in (": a kind", *(" ".join(words) for words in kind), "")]
    items = analogies.process_docs(Dataset.from_dict({"text": lines}))
    found = [[item["first"], item["second"], item["third"], item["choices"][item["gold"]]] for item in items]
    assert sorted(found) == sorted(words for kind in kinds for words in kind)
    assert {words[0][0] for words in found[:10]} == {"a", "b"}  # a limit takes both
    for item in items:
        assert len({*item["choices"]}) == 4
        assert {word[0] for word in item["choices"]} == {item["second"][0]}
        assert item["second"] not in item["choices"]
    assert {item["gold"] for item in items} == {0, 1, 2, 3}
    assert [*analogies.process_docs(Dataset.from_dict({"text": lines}))] == [*items]
