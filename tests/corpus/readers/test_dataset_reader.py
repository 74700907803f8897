from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.corpus.readers.base import Piece
from tasks.corpus.records import CorpusError
from tasks.sources import SourceError
from tests.corpus.readers.reading import lines, read, reader_of, records_of
from tests.corpus.texts import sentences

TEXTS = sentences(3000, seed=7)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of two splits, the first in three files."""
    root = tmp_path / "tales"
    (root / "data").mkdir(parents=True)
    for i in range(3):
        table = pa.table({"text": TEXTS[1000 * i : 1000 * i + 1000], "n": range(1000)})
        pq.write_table(table, root / f"data/train-{i:05d}-of-00003.parquet", row_group_size=300)
    pq.write_table(pa.table({"text": ["t", None], "n": [1, 2]}), root / "data/test-00000-of-00001.parquet")
    return root


def test_a_dataset_folder_gives_its_split_shard_by_shard(folder: Path) -> None:
    result, rejects = read(folder, format="dataset")
    assert [document.text for document in result] == TEXTS
    assert [(d.source, d.row) for d in result] == [(f"tales#{i}", row) for i in range(3) for row in range(1000)]
    assert rejects == []
    result, rejects = read(folder, format="dataset", split="test")
    assert [document.text for document in result] == ["t"]
    assert [(reject.rule, reject.source, reject.row) for reject in rejects] == [("null field", "tales#0", 1)]


def test_shards_are_pieces_that_are_grouped_by_size(folder: Path) -> None:
    reader = reader_of(folder, format="dataset")
    size = reader.size(Piece("tales#0", 0, 1))
    files = sum(path.stat().st_size for path in (folder / "data").glob("train-*"))
    assert size == files // 3
    assert [[piece.path for piece in task] for task in reader.tasks(task_bytes=2 * size)] == [
        ["tales#0", "tales#1"],
        ["tales#2"],
    ]
    assert records_of(reader, task_bytes=1) == records_of(reader)


def test_json_lines_and_subsets_come_as_datasets_reads_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(lines([name, name]))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/*\n- config_name: two\n  data_files: two/*\n---\n"
    )
    result, _ = read(tmp_path, format="dataset", subset="two")
    assert [document.text for document in result] == ["two", "two"]
    with pytest.raises(SourceError, match=r"'three' not found. Available: \['one', 'two'\]"):
        read(tmp_path, format="dataset", subset="three")


def test_unknown_splits_and_columns_are_named_with_those_there_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"Bad split: val. Available splits: \['train', 'test'\]"):
        read(folder, format="dataset", split="val")
    with pytest.raises(CorpusError, match=r"has no column 'body'; set text_field to one of \['text', 'n'\]"):
        read(folder, format="dataset", text_field="body")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/a.txt").write_text("a line\n")
    with pytest.raises(CorpusError, match=r"has no column 'body'; set text_field to one of \['text'\]"):
        read(tmp_path / "plain", format="dataset", text_field="body")


def test_a_damaged_file_of_a_dataset_is_an_error_that_names_its_shard(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]))
    (tmp_path / "b.jsonl").write_bytes(lines(["two"]) + b'{"text": "cut')
    with pytest.raises(CorpusError, match=r"#1: cannot be read \(.*\); mend or leave out that file"):
        read(tmp_path, format="dataset")


def test_the_digest_of_a_dataset_folder_is_checked(folder: Path) -> None:
    with pytest.raises(SourceError, match="sha256 is"):
        read(folder, format="dataset", sha256="0" * 64)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:org/name@main", "'main' can move; write the commit it stands for, 40 hex digits .*git ls-remote"),
        ("hub:org/name@" + "a" * 40, r"hub:org/name@a{40}' \(split 'train'\): Couldn't reach 'org/name'"),
        ("pypi:name==1/a.parquet", "format dataset reads hub:ORG/NAME@COMMIT or the dir: of a folder"),
        ("dir:/nowhere", "format dataset reads hub:ORG/NAME@COMMIT or the dir: of a folder"),
    ],
)
def test_what_is_no_dataset_is_refused(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=message):
        read(source, format="dataset")


def test_a_commit_of_the_hub_needs_no_digest() -> None:
    with pytest.raises(SourceError, match="its commit pins it; leave sha256 out"):
        read("hub:org/name@" + "a" * 40, format="dataset", sha256="0" * 64)
