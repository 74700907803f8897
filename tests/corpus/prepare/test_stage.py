"""What the stage makes of its sources, what it refuses, and what it does not do twice."""

from __future__ import annotations

import copy
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tasks import scratch, settings, sources
from tasks.corpus import manifest, shards
from tasks.corpus.prepare import chunk_store, scan, stage, tokenise
from tasks.corpus.records import CorpusError
from tasks.corpus.tokenizer import encoder
from tests.corpus.texts import ROOT, Project, jsonl, run, sentences, texts_of


def test_every_document_lands_in_one_split_with_its_text_whole(corpus: Path) -> None:
    for domain, n, seed in (("prose", 300, 1), ("code", 200, 2)):
        train, validation, test = (texts_of(corpus, domain, split) for split in manifest.SPLITS)
        assert sorted(train + validation + test) == sorted(sentences(n, seed=seed))
        for held in (validation, test):
            assert 0.04 < len(held) / n < 0.17  # 0.1 expected, 3 standard deviations


def test_manifest_and_metrics_count_what_is_there(corpus: Path) -> None:
    made = manifest.load(corpus)
    metrics = json.loads(corpus.with_name("tiny.json").read_text())
    prose = made.domains["prose"]
    assert prose.rules == {"read": 300, "bad": 0, "empty": 0, "duplicate": 0, "kept": 300}
    assert prose.license == "CC-BY-4.0"
    assert sum(part.documents for part in prose.splits.values()) == 300
    text_bytes = sum(len(text.encode()) for text in sentences(300, seed=1))
    assert sum(part.bytes for part in prose.splits.values()) == text_bytes
    assert len(prose.train.shards) > 2
    for part in prose.splits.values():
        batches = [shards.open_shard(corpus / shard.path) for shard in part.shards]
        assert sum(len(shards.flat_ids(batch)) for batch in batches) == part.tokens
    assert metrics["domains"]["prose"]["tokens"] == {split: part.tokens for split, part in prose.splits.items()}
    assert metrics["tokens"] == sum(d.tokens for d in made.domains.values())
    assert metrics["sha256"] == made.sha256
    assert metrics["tokens_per_second"] > 0


def test_datasets_opens_a_shard_with_the_rows_and_ids_of_the_reference_tokenizer(
    corpus: Path, byte_level: Path
) -> None:
    import datasets
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    by_row = dict(enumerate(sentences(300, seed=1)))
    shard = manifest.load(corpus).domains["prose"].train.shards[0]
    rows = datasets.Dataset.from_file(str(corpus / shard.path))
    assert len(rows) == shard.documents
    for row in rows:
        assert row["input_ids"] == [*reference.encode(by_row[row["row"]]).ids, 0]
        assert row["source"] == "prose.jsonl"
        assert row["doc_id"] == scan.doc_id(by_row[row["row"]])


def test_documents_are_shuffled_by_the_seed_and_the_same_set_is_held_out(corpus: Path) -> None:
    def ids(split: str) -> list[bytes]:
        paths = sorted((corpus / "prose" / split).glob("*.arrow"))
        return [i for path in paths for i in shards.open_shard(path).column("doc_id").to_pylist()]

    first = {split: ids(split) for split in manifest.SPLITS}
    rows = shards.open_shard(corpus / "prose/train/part-00000-000.arrow").column("row").to_pylist()
    assert rows != sorted(rows)
    raw = json.loads(Path("pipelines.yaml").read_text())
    raw["corpora"]["tiny"]["seed"] = 5
    Path("pipelines.yaml").write_text(json.dumps(raw))
    run()
    for split in manifest.SPLITS:
        assert ids(split) != first[split]
        assert sorted(ids(split)) == sorted(first[split])


def test_no_number_of_tasks_or_processes_changes_the_documents(project: Project) -> None:
    texts = sentences(300, seed=11)
    domains = {"a": texts, "b": texts[:50] + sentences(100, seed=12)}
    rows, digests = [], []
    for task_bytes, workers in ((1 << 28, 1), (5000, 1), (5000, 2)):
        corpus = project(domains, task_bytes=task_bytes)
        run(workers=workers)
        batches = map(shards.open_shard, sorted(corpus.glob("a/*/*.arrow")))
        columns = ((batch["row"].to_pylist(), batch["doc_id"].to_pylist()) for batch in batches)
        rows.append(sorted(pair for column in columns for pair in zip(*column, strict=True)))
        digests.append(manifest.load(corpus).sha256)
    assert [row for row, _ in rows[1]] == list(range(300))  # lines of the file, not of the task
    assert rows[0] == rows[1] == rows[2]
    assert digests[1] == digests[2]


def test_sources_without_a_fingerprint_or_changed_since_say_what_to_do(corpus: Path, project: Project) -> None:
    with Path("code.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(sources.SourceError, match=r"sources changed .*\(domain code\); run again with --refresh"):
        stage.make("tiny")
    before = manifest.load(corpus).sha256
    run()
    assert manifest.load(corpus).sha256 != before
    corpus.with_name("tiny.sources.json").unlink()
    with pytest.raises(sources.SourceError, match=r"python -m tasks.corpus.fingerprint tiny"):
        stage.make("tiny")


@pytest.mark.parametrize(("heldout", "split"), [(1e-9, "validation"), (0.999999, "train")])
def test_a_domain_without_documents_in_a_split_is_an_error(project: Project, heldout: float, split: str) -> None:
    project({"prose": sentences(30, seed=6)}, heldout=heldout)
    with pytest.raises(CorpusError, match=rf"domain prose: no document for the {split} split.*30 kept") as e:
        run()
    assert f"heldout = {heldout}" in str(e.value)


def test_what_can_give_no_three_splits_is_refused_before_anything_is_read(project: Project, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(name)
    files = {"source": f"dir:{tmp_path}/*.txt", "format": "text"}
    project({"notes": files})
    with pytest.raises(CorpusError, match="domain notes: 2 files are 2 documents, and train, validation, test need"):
        run()
    project({"notes": {**files, "heldout": 0.0}})
    with pytest.raises(settings.SettingsError, match=r"domains.notes.heldout = 0.0: Input should be greater than 0"):
        stage.make("tiny")


def test_bad_lines_above_the_share_stop_the_domain_and_below_it_are_reported(project: Project, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in sentences(99, seed=7)]
    lines.insert(50, '{"text": "torn')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    domain = {"source": f"dir:{tmp_path}/a.jsonl.gz"}
    project({"prose": domain}, max_bad=0.001)
    message = r"domain prose: 1 of 100 records are bad \(1.00%\).*a.jsonl.gz, row 50"
    with pytest.raises(CorpusError, match=message) as error:
        run()
    (listed,) = Path(str(error.value).rpartition("; ")[2].removesuffix(" has examples")).read_text().splitlines()
    assert json.loads(listed)["row"] == 50
    project({"prose": domain}, max_bad=0.02)
    metrics = run()
    assert metrics["domains"]["prose"]["rules"]["bad"] == 1
    assert "a.jsonl.gz, row 50" in metrics["domains"]["prose"]["bad"]["invalid JSON"]


def test_an_error_of_a_reader_or_of_a_source_names_the_domain(project: Project, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    project({"prose": {"source": f"dir:{tmp_path}/a.parquet", "format": "parquet"}})
    with pytest.raises(CorpusError, match=r"domain prose: a.parquet: has no column 'text'"):
        run()
    project({"prose": {"source": jsonl(tmp_path / "a.jsonl", ["x"]), "sha256": "0" * 64}})
    message = r"domain prose: .*sha256 is [0-9a-f]{64}, but pipelines.yaml says 000"
    with pytest.raises(sources.SourceError, match=message):
        run()


def test_a_second_run_of_the_same_corpus_at_the_same_time_is_refused(corpus: Path) -> None:
    before = scratch.digest(corpus)
    busy = pytest.raises(scratch.BusyError, match="corpus tiny is already being run")
    with scratch.workspace("corpus", "tiny"), busy:
        stage.make("tiny")
    assert scratch.digest(corpus) == before


def test_what_is_finished_is_neither_read_nor_tokenised_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = sentences(400, seed=8)
    corpus = project({"a": texts}, shard_tokens=2000)
    monkeypatch.setattr(tokenise, "BATCH_BYTES", 5000)
    monkeypatch.setattr(chunk_store, "CHUNK_RECORDS", 50)
    encoded: list[str] = []
    read: list[str] = []
    encode, doc_id = encoder.Encoder.encode, scan.doc_id
    left = 18  # calls until the end comes

    def watched(self: encoder.Encoder, texts: list[str]) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        encoded.extend(texts)
        return encode(self, texts)

    def counted(text: str) -> bytes:
        if len(read) == 220:
            read.append("the end")
            raise KeyboardInterrupt
        read.append(text)
        return doc_id(text)

    monkeypatch.setattr(encoder.Encoder, "encode", watched)
    monkeypatch.setattr(scan, "doc_id", counted)
    for _ in range(2):  # ended in the scan, then in the tokenizer
        with pytest.raises(KeyboardInterrupt):
            run()
    assert len(read) == 1 + 400 + 20  # the fifth chunk of 50 was begun, and read again
    before = len(encoded)
    run()
    assert len(read) == 421
    assert before > 200
    assert len(encoded) - 400 < before / 2  # the parts that were committed stay
    assert sorted(text for split in manifest.SPLITS for text in texts_of(corpus, "a", split)) == sorted(texts)


def test_the_command_line_reports_an_error_in_one_line_and_fails(project: Project) -> None:
    project({"a": {"source": "dir:nowhere.jsonl"}})
    done = subprocess.run(
        [sys.executable, "-m", "tasks.corpus.fingerprint", "tiny"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("corpus tiny: domain a: source 'dir:nowhere.jsonl' matches no file")


def test_the_fingerprint_stage_imports_nothing_heavy() -> None:
    heavy = "('torch', 'pyarrow', 'tokenizers')"
    code = f"import sys, tasks.corpus.fingerprint; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_fast_tokenizer_that_proves_wrong_on_the_way_leaves_no_token(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = scratch.digest(corpus)
    shutil.rmtree(corpus)
    wrong = 20
    encode = encoder.Encoder.encode

    def mismatch(self: encoder.Encoder, texts: list[str]) -> Any:
        nonlocal wrong
        wrong -= 1
        if not wrong:
            raise encoder.BackendMismatch("document 'the': differs from the reference at token 3")
        ids, offsets = encode(self, texts)
        return (ids, offsets) if wrong < 0 else (ids * 0, offsets)

    monkeypatch.setattr(encoder.Encoder, "encode", mismatch)
    monkeypatch.setattr(tokenise, "BATCH_BYTES", 1000)
    with pytest.warns(UserWarning, match="differs from the reference at token 3; everything is tokenised by the"):
        stage.make("tiny", run=stage.processes(1))
    assert scratch.digest(corpus) == clean


def test_a_mismatch_that_another_worker_meets_meanwhile_lets_no_token_of_the_fast_tokenizer_in(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = scratch.digest(corpus)
    shutil.rmtree(corpus)
    load = stage._encoder

    class Wrong(encoder.Encoder):
        def encode(self, texts: Any) -> Any:
            ids, offsets = super().encode(texts)
            return ids * 0, offsets

    def met_elsewhere(settings: Any, *, backend: str = "reference") -> encoder.Encoder:
        one = copy.copy(load(settings))
        if backend == "auto":
            one.__class__ = Wrong
            (work,) = Path(".scratch/corpus-tiny").glob("*/")
            scratch.write_json(work / "mismatch.json", {})
        return one

    monkeypatch.setattr(stage, "_encoder", met_elsewhere)
    stage.make("tiny", run=stage.processes(1))
    assert scratch.digest(corpus) == clean


def test_settings_with_numbers_for_keys_come_back_from_the_plan(project: Project, tmp_path: Path) -> None:
    rule = {"rule": "gopher_repetition", "top_n_grams": {2: 0.9}, "dup_n_grams": {}}
    project({"a": sentences(30, seed=1)}, filters=[rule])
    settings_file = Path("pipelines.yaml")
    # YAML has numbers for keys, JSON has not
    settings_file.write_text(settings_file.read_text().replace('{"2": 0.9}', "{2: 0.9}"))
    assert run()["domains"]["a"]["rules"]["kept"] > 10
