from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from tasks.corpus import manifest, shards
from tasks.corpus.records import CorpusError
from tasks.tools import export_megatron
from tests.corpus.handmade import corpus as handmade
from tests.corpus.texts import Project, run, sentences


def parsed(prefix: Path) -> list[list[int]]:
    """The documents of a .bin/.idx pair, read as megatron/core/datasets/indexed_dataset.py lays them out."""
    index = Path(f"{prefix}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, entries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    dtype = {4: np.int32, 8: np.uint16}[code]
    start = 9 + 8 + 1 + 8 + 8
    lengths = np.frombuffer(index, np.int32, sequences, start)
    pointers = np.frombuffer(index, np.int64, sequences, start + lengths.nbytes)
    documents = np.frombuffer(index, np.int64, entries, start + lengths.nbytes + pointers.nbytes)
    assert len(index) == start + lengths.nbytes + pointers.nbytes + documents.nbytes
    assert documents.tolist() == list(range(sequences + 1))
    content = Path(f"{prefix}.bin").read_bytes()
    assert len(content) == lengths.sum() * np.dtype(dtype).itemsize
    return [
        np.frombuffer(content, dtype, length, pointer).tolist()
        for length, pointer in zip(lengths.tolist(), pointers.tolist(), strict=True)
    ]


def documents_of(corpus: Path, domain: str, split: str) -> list[list[int]]:
    """The ids of each document, in the order of the shards."""
    part = getattr(manifest.load(corpus).domains[domain], split)
    return [ids for s in part.shards for ids in shards.open_shard(corpus / s.path).column("input_ids").to_pylist()]


def test_every_split_is_a_pair_that_holds_its_documents_in_order(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = export_megatron.export(corpus, out)
    names = {f"{domain}_{split}" for domain in ("prose", "code") for split in manifest.SPLITS}
    assert set(written) == names
    assert {path.name for path in out.iterdir()} == {f"{name}{end}" for name in names for end in (".bin", ".idx")}
    for name in names:
        domain, split = name.split("_")
        documents = documents_of(corpus, domain, split)
        assert parsed(out / name) == documents
        assert written[name] == sum(map(len, documents))


def test_what_is_written_does_not_depend_on_how_much_is_written_at_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_megatron.export(corpus, tmp_path / "whole")
    monkeypatch.setattr(export_megatron, "BLOCK", 7)
    export_megatron.export(corpus, tmp_path / "pieces")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "pieces" / path.name).read_bytes()


@pytest.mark.parametrize(("vocab_size", "code"), [(65536, 8), (65537, 4)])
def test_a_large_vocabulary_is_stored_as_int32_for_megatron_has_no_uint32(
    project: Project, tmp_path: Path, byte_level: Path, vocab_size: int, code: int
) -> None:
    corpus = project({"a": sentences(60, seed=1)})
    model = Path("data/models/small")
    model.unlink()
    shutil.copytree(byte_level, model)
    (model / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    run()
    export_megatron.export(corpus, tmp_path / "out", splits=("train",))
    assert (tmp_path / "out/a_train.idx").read_bytes()[17] == code
    assert parsed(tmp_path / "out/a_train") == documents_of(corpus, "a", "train")


def test_documents_come_back_from_megatron_with_the_ids_they_had(project: Project, tmp_path: Path) -> None:
    corpus = project({"a": sentences(120, seed=1)}, shard_tokens=1000)
    run()
    before = {split: sorted(documents_of(corpus, "a", split)) for split in manifest.SPLITS}
    export_megatron.export(corpus, tmp_path / "out")
    project({"a": {"source": f"dir:{tmp_path}/out/a_*", "format": "megatron"}}, shard_tokens=1000)
    run()
    assert {split: sorted(documents_of(corpus, "a", split)) for split in before} == before


def test_a_shard_that_is_not_the_manifests_stops_the_export_before_there_is_an_index(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    corpus = handmade(tmp_path / "made", {"a": [[[1, 2, 0], [3, 0]], [[4, 0]]]})
    export_megatron.export(corpus, tmp_path / "out", splits=("train",))
    assert parsed(tmp_path / "out/a_train") == [[1, 2, 0], [3, 0], [4, 0]]
    before = (tmp_path / "out/a_train.bin").read_bytes()
    first, second = sorted((corpus / "a/train").glob("*.arrow"))
    shutil.copy(first, second)
    with pytest.raises(CorpusError, match=r"part-00001-000.arrow: 5 ids up to 3, the manifest says 2 up to 4"):
        export_megatron.export(corpus, tmp_path / "out", splits=("train",))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_train.bin"]
    assert (tmp_path / "out/a_train.bin").read_bytes() == before


def test_the_command_line_names_what_it_wrote_or_one_error(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(path: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["export", str(path), str(tmp_path / "out"), "--split", "test"])
        return export_megatron.main()

    tokens = manifest.load(corpus).domains["code"].test.tokens
    capsys.readouterr()
    assert call(corpus) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/out/code_test.bin: {tokens:,} tokens\n" in printed
    assert len(printed.splitlines()) == 2
    assert call(tmp_path / "nowhere") == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path}/nowhere/manifest.json: not found")
