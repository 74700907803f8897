from __future__ import annotations

import copy
import gzip
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tasks import scratch, settings, sources
from tasks.corpus import manifest, shards
from tasks.corpus.build import chunk_store, scan, stage, tokenise
from tasks.corpus.records import CorpusError
from tasks.corpus.tokenizer import encoder
from tests.corpus.texts import WORDS, jsonl, run, sentences

ROOT = Path(__file__).parents[3]
Project = Callable[..., Path]


def texts_of(corpus: Path, domain: str, split: str) -> list[str]:
    """The documents of a split, decoded from its shards."""
    one = encoder.load_encoder(Path("data/models/small"))
    return [
        one.decode(ids[:-1])
        for path in sorted((corpus / domain / split).glob("*.arrow"))
        for ids in shards.open_shard(path).column("input_ids").to_pylist()
    ]


def test_every_document_lands_in_one_split_with_its_text_whole(corpus: Path) -> None:
    for domain, n, seed in (("prose", 300, 1), ("code", 200, 2)):
        train, validation, test = (texts_of(corpus, domain, split) for split in manifest.SPLITS)
        assert sorted(train + validation + test) == sorted(sentences(n, seed=seed))
        for held in (validation, test):
            assert 0.04 < len(held) / n < 0.17  # 0.1 expected, 3 standard deviations


def test_manifest_and_metrics_count_what_is_there(corpus: Path) -> None:
    found = manifest.load(corpus)
    metrics = json.loads(corpus.with_name("tiny.json").read_text())
    prose = found.domains["prose"]
    assert prose.rules == {"read": 300, "bad": 0, "empty": 0, "duplicate": 0, "kept": 300}
    assert prose.license == "CC-BY-4.0"
    assert sum(part.documents for part in prose.splits.values()) == 300
    assert sum(part.bytes for part in prose.splits.values()) == sum(
        len(text.encode()) for text in sentences(300, seed=1)
    )
    assert len(prose.train.shards) > 2
    for part in prose.splits.values():
        batches = [shards.open_shard(corpus / shard.path) for shard in part.shards]
        assert sum(len(shards.flat_ids(batch)) for batch in batches) == part.tokens
    assert metrics["domains"]["prose"]["tokens"] == {split: part.tokens for split, part in prose.splits.items()}
    assert metrics["tokens"] == sum(d.tokens for d in found.domains.values())
    assert metrics["sha256"] == found.sha256
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


def test_documents_are_shuffled_by_the_seed_and_the_same_set_is_held_out(corpus: Path, project: Project) -> None:
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


def test_hold_out_does_not_depend_on_the_order_of_documents(project: Project, tmp_path: Path) -> None:
    texts = sentences(1000, seed=3)
    held = []
    for share, order in ((0.1, texts), (0.1, texts[::-1]), (0.2, texts)):
        root = project({"prose": {"source": jsonl(tmp_path / "a.jsonl", order)}}, heldout=share)
        run()
        found = root / "data/corpora/tiny"
        held.append({split: set(texts_of(found, "prose", split)) for split in ("validation", "test")})
    assert held[0] == held[1]
    for split in ("validation", "test"):
        assert 30 < len(held[0][split]) < 70
        assert held[0][split] < held[2][split]
    assert not held[2]["validation"] & held[2]["test"]


def test_duplicates_go_within_and_across_domains_first_domain_first(project: Project, tmp_path: Path) -> None:
    shared = sentences(40, seed=4)
    variants = [text.replace(" ", "  ").replace("ö", "o\u0308") for text in shared[:10]]  # same words, other bytes
    own = sentences(60, seed=5)
    root = project(
        {
            "zeta": {"source": jsonl(tmp_path / "z.jsonl", shared + variants + [" \n\t", ""])},
            "alpha": {"source": jsonl(tmp_path / "a.jsonl", own + shared)},
        }
    )
    run()
    found = manifest.load(root / "data/corpora/tiny").domains
    assert found["zeta"].rules == {"read": 52, "bad": 0, "empty": 2, "duplicate": 10, "kept": 40}
    assert found["alpha"].rules == {"read": 100, "bad": 0, "empty": 0, "duplicate": 40, "kept": 60}


def test_sources_changed_since_their_fingerprint_ask_for_a_refresh(corpus: Path, tmp_path: Path) -> None:
    with (tmp_path / "code.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(sources.SourceError, match=r"sources changed .*\(domain code\); run again with --refresh"):
        stage.make("tiny")
    before = manifest.load(corpus).sha256
    run()
    assert manifest.load(corpus).sha256 != before


def test_without_fingerprints_the_stage_says_which_command_makes_them(project: Project, tmp_path: Path) -> None:
    project({"a": {"source": jsonl(tmp_path / "a.jsonl", sentences(9, seed=1))}})
    with pytest.raises(sources.SourceError, match=r"python -m tasks.corpus.fingerprint tiny"):
        stage.make("tiny")


@pytest.mark.parametrize(("heldout", "split"), [(1e-9, "validation"), (0.999999, "train")])
def test_a_domain_without_documents_in_a_split_is_an_error(
    project: Project, tmp_path: Path, heldout: float, split: str
) -> None:
    project({"prose": {"source": jsonl(tmp_path / "a.jsonl", sentences(30, seed=6)), "heldout": heldout}})
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
    with pytest.raises(
        CorpusError, match=r"domain prose: 1 of 100 records are bad \(1.00%\).*a.jsonl.gz, row 50"
    ) as error:
        run()
    (listed,) = Path(str(error.value).rpartition("; ")[2].removesuffix(" has examples")).read_text().splitlines()
    assert json.loads(listed)["row"] == 50
    project({"prose": domain}, max_bad=0.02)
    metrics = run()
    assert metrics["domains"]["prose"]["rules"]["bad"] == 1
    assert "a.jsonl.gz, row 50" in metrics["domains"]["prose"]["bad"]["invalid JSON"]


def test_a_missing_column_names_the_domain(project: Project, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    project({"prose": {"source": f"dir:{tmp_path}/a.parquet", "format": "parquet"}})
    with pytest.raises(CorpusError, match=r"domain prose: a.parquet: has no column 'text'"):
        run()


def test_a_wrong_sha256_names_the_domain(project: Project, tmp_path: Path) -> None:
    project({"prose": {"source": jsonl(tmp_path / "a.jsonl", ["x"]), "sha256": "0" * 64}})
    with pytest.raises(
        sources.SourceError, match=r"domain prose: .*sha256 is [0-9a-f]{64}, but pipelines.yaml says 000"
    ):
        run()


def test_a_second_run_of_the_same_corpus_at_the_same_time_is_refused(corpus: Path) -> None:
    before = scratch.digest(corpus)
    with (
        scratch.workspace("corpus", "tiny"),
        pytest.raises(scratch.BusyError, match="corpus tiny is already being run"),
    ):
        stage.make("tiny")
    assert scratch.digest(corpus) == before


def test_what_is_finished_is_neither_read_nor_tokenised_again(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = sentences(400, seed=8)
    root = project({"a": {"source": jsonl(tmp_path / "a.jsonl", texts)}}, shard_tokens=2000)
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
    assert sorted(texts_of(root / "data/corpora/tiny", "a", "train")) == sorted(
        set(texts) - {text for held in manifest.SPLITS[1:] for text in texts_of(root / "data/corpora/tiny", "a", held)}
    )


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *arguments], env=environment, stderr=subprocess.PIPE)


def test_the_command_line_reports_an_error_in_one_line_and_fails(project: Project) -> None:
    project({"a": {"source": "dir:nowhere.jsonl"}})
    process = _start("-m", "tasks.corpus.fingerprint", "tiny")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.decode().startswith("corpus tiny: domain a: source 'dir:nowhere.jsonl' matches no file")
    assert len(errors.decode().splitlines()) == 1


def test_the_fingerprint_stage_imports_nothing_heavy() -> None:
    heavy = "('torch', 'pyarrow', 'tokenizers')"
    code = f"import sys, tasks.corpus.fingerprint; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_number_of_tasks_or_processes_changes_the_documents(project: Project, tmp_path: Path) -> None:
    texts = sentences(300, seed=11)
    domains = {
        "a": {"source": jsonl(tmp_path / "a.jsonl", texts)},
        "b": {"source": jsonl(tmp_path / "b.jsonl", texts[:50] + sentences(100, seed=12))},
    }
    rows = {}
    for task_bytes, workers in ((1 << 28, 1), (5000, 1), (5000, 2)):
        root = project(domains, task_bytes=task_bytes)
        run(workers=workers)
        corpus = root / "data/corpora/tiny"
        shard = [shards.open_shard(path) for path in sorted(corpus.glob("a/*/*.arrow"))]
        rows[task_bytes, workers] = sorted(
            (row, identity)
            for batch in shard
            for row, identity in zip(batch["row"].to_pylist(), batch["doc_id"].to_pylist(), strict=True)
        )
        rows[f"sha {task_bytes} {workers}"] = manifest.load(corpus).sha256
    assert [row for row, _ in rows[5000, 1]] == list(range(300))  # lines of the file, not of the task
    assert rows[1 << 28, 1] == rows[5000, 1] == rows[5000, 2]
    assert rows["sha 5000 1"] == rows["sha 5000 2"]


def test_a_document_and_its_near_duplicates_stand_in_one_split_and_the_first_domain_keeps_its_own(
    project: Project, tmp_path: Path
) -> None:
    rng = random.Random(12)
    long = [" ".join(rng.choices(WORDS, k=200)) for _ in range(150)]
    near = [text.replace("the ", "The  ", 1) + " indeed" for text in long]
    domains = {
        "zeta": {"source": jsonl(tmp_path / "z.jsonl", long)},
        "alpha": {"source": jsonl(tmp_path / "a.jsonl", near + long[:20] + sentences(100, seed=1)), "heldout": 0.5},
    }
    corpus = project(domains, near_duplicates={}) / "data/corpora/tiny"

    def splits_of_each() -> dict[str, set[str]]:
        """The original of each long document -> the splits in which it or its near-duplicate stands."""
        found: dict[str, set[str]] = {text: set() for text in long}
        for domain, split in itertools.product(domains, manifest.SPLITS):
            for text in texts_of(corpus, domain, split):
                original = text.removesuffix(" indeed").replace("The  ", "the ", 1)
                found.get(original, set()).add(split)
        return found

    for action in ("drop", "group"):
        project(domains, near_duplicates={"action": action})
        run()
        rules = {name: domain.rules for name, domain in manifest.load(corpus).domains.items()}
        assert rules["zeta"]["near_duplicate"] == 0
        assert rules["alpha"]["near_duplicate"] == (150 if action == "drop" else 0)
        assert rules["alpha"]["duplicate"] == 20
        homes = splits_of_each()
        assert all(len(splits) == 1 for splits in homes.values())
        assert {split for splits in homes.values() for split in splits} == set(manifest.SPLITS)
    project(domains)  # not looked for: they stand on both sides
    run()
    assert any(len(splits) > 1 for splits in splits_of_each().values())


def test_problems_and_tables_that_differ_in_their_numbers_stay_unless_a_domain_says_otherwise(
    project: Project, tmp_path: Path
) -> None:
    problems = [f"Question {n}: what is {7 * n} plus {n * n}? Answer: {7 * n + n * n}." for n in range(100)]
    rng = random.Random(3)
    tables = ["\n".join(f"Item {row}: {rng.randint(100, 999)} EUR" for row in range(30)) for _ in range(100)]
    same = [" ".join(rng.choices(WORDS, k=60)) for _ in range(60)]
    doubled = [*same, *(f"{text} again" for text in same)]
    domains = {
        "problems": {"source": jsonl(tmp_path / "p.jsonl", problems)},
        "tables": {"source": jsonl(tmp_path / "t.jsonl", tables)},
        "dates": {"source": jsonl(tmp_path / "d.jsonl", [f"{text} x" for text in tables] + sentences(60, seed=4))},
        "doubled": {"source": jsonl(tmp_path / "s.jsonl", [f"{text} once" for text in doubled])},
        "left": {"source": jsonl(tmp_path / "l.jsonl", [text.upper() + " !" for text in doubled])},
    }
    domains["dates"]["near_duplicates"] = {"digits": False}
    domains["left"]["near_duplicates"] = "none"
    project(domains, near_duplicates={})
    rules = {name: domain["rules"] for name, domain in run()["domains"].items()}
    assert {name: counts["near_duplicate"] for name, counts in rules.items()} == {
        "problems": 0,
        "tables": 0,
        "dates": 99,
        "doubled": 60,
        "left": 0,
    }


def test_what_was_dropped_is_counted_by_rule_and_listed_with_its_place(project: Project, tmp_path: Path) -> None:
    item = "how many of the quick brown wizards does it take to brew one pot of strong tea"
    texts = [*sentences(100, seed=13), "tiny", f"they asked {item} today"]
    source = jsonl(tmp_path / "a.jsonl", texts)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{\n" * 150)
    jsonl(tmp_path / "items.jsonl", [item])
    root = project(
        {"a": {"source": source}},
        max_bad=0.7,
        task_bytes=2000,
        filters=[{"rule": "length", "min_chars": 10}],
        keep_rejects=True,
        decontaminate={"items": [{"name": "quiz", "source": f"dir:{tmp_path}/items.jsonl"}]},
    )
    metrics = run()
    corpus = root / "data/corpora/tiny"
    rules = manifest.load(corpus).domains["a"].rules
    assert rules == {
        "read": 252,
        "bad": 150,
        "empty": 0,
        "length.too_short": 1,
        "contaminated": 1,
        "duplicate": 0,
        "kept": 100,
    }
    assert metrics["domains"]["a"]["bad"]["invalid JSON"].startswith("150, the first in a.jsonl, row 102")
    listed = [json.loads(line) for path in sorted(corpus.glob("rejects/a/*")) for line in path.open()]
    assert {"rule": "length.too_short", "source": "a.jsonl", "row": 100, "text": "tiny"} in listed
    hit = next(entry for entry in listed if entry["rule"] == "contaminated")
    assert hit["row"] == 101
    assert hit["detail"].startswith("quiz:0: ")
    bad = [entry for entry in listed if entry["rule"] == "invalid JSON"]
    assert [entry["row"] for entry in bad] == list(range(102, 102 + len(bad)))
    verdicts = [
        verdict
        for path in sorted(corpus.glob("verdicts/a/*"))
        for verdict in pa.ipc.open_file(path).read_all()["verdict"].to_pylist()
    ]
    assert len(verdicts) == 252
    assert verdicts[100:103] == ["length.too_short", "contaminated", "bad: invalid JSON"]
    assert verdicts.count("train") == manifest.load(corpus).domains["a"].train.documents


def test_a_fast_tokenizer_found_wrong_on_the_way_leaves_no_token(
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


def test_settings_with_numbers_for_keys_come_back_from_the_plan(project: Project, tmp_path: Path) -> None:
    rule = {"rule": "gopher_repetition", "top_n_grams": {2: 0.9}, "dup_n_grams": {}}
    project({"a": {"source": jsonl(tmp_path / "a.jsonl", sentences(30, seed=1)), "filters": [rule]}})
    raw = (
        Path("pipelines.yaml").read_text().replace('{"2": 0.9}', "{2: 0.9}")
    )  # YAML has numbers for keys, JSON has not
    Path("pipelines.yaml").write_text(raw)
    assert run()["domains"]["a"]["rules"]["kept"] > 10


def test_a_mismatch_that_another_worker_finds_meanwhile_lets_no_token_of_the_fast_tokenizer_in(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = scratch.digest(corpus)
    shutil.rmtree(corpus)
    load = stage._encoder

    class Wrong(encoder.Encoder):
        def encode(self, texts: Any) -> Any:
            ids, offsets = super().encode(texts)
            return ids * 0, offsets

    def found_elsewhere(settings: Any, *, backend: str = "reference") -> encoder.Encoder:
        one = copy.copy(load(settings))
        if backend == "auto":
            one.__class__ = Wrong
            (work,) = Path(".scratch/corpus-tiny").glob("*/")
            scratch.write_json(work / "mismatch.json", {})
        return one

    monkeypatch.setattr(stage, "_encoder", found_elsewhere)
    stage.make("tiny", run=stage.processes(1))
    assert scratch.digest(corpus) == clean


def test_a_unit_that_failed_is_not_counted_as_finished(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CorpusError("torn")

    monkeypatch.setattr(scan, "scan", fail)
    project({"a": {"source": jsonl(tmp_path / "a.jsonl", sentences(9, seed=1))}})
    with pytest.raises(CorpusError, match="torn"):
        run()
    (path,) = Path(".scratch").glob("*/*/progress/scan-a-*")
    assert json.loads(path.read_text())["done"] is False
