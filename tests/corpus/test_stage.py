from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tasks import scratch, sources
from tasks.corpus import __main__ as stage
from tasks.corpus import build, encoder, manifest, shards
from tasks.corpus.records import CorpusError

from .texts import jsonl, run, sentences

ROOT = Path(__file__).parents[2]
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
        train, heldout = (texts_of(corpus, domain, split) for split in build.SPLITS)
        assert sorted(train + heldout) == sorted(sentences(n, seed=seed))
        assert 0.1 < len(heldout) / n < 0.3  # 0.2 asked for, 3 standard deviations


def test_manifest_and_metrics_count_what_is_there(corpus: Path) -> None:
    found = manifest.load(corpus)
    metrics = json.loads(corpus.with_name("tiny.json").read_text())
    prose = found.domains["prose"]
    assert prose.rules == {"read": 300, "bad": 0, "empty": 0, "duplicate": 0, "kept": 300}
    assert prose.license == "CC-BY-4.0"
    assert prose.train.documents + prose.heldout.documents == 300
    assert prose.train.bytes + prose.heldout.bytes == sum(len(text.encode()) for text in sentences(300, seed=1))
    assert len(prose.train.shards) > 2
    for part in (prose.train, prose.heldout):
        batches = [shards.open_shard(corpus / shard.path) for shard in part.shards]
        assert sum(len(shards.flat_ids(batch)) for batch in batches) == part.tokens
    assert metrics["domains"]["prose"]["tokens"] == {"train": prose.train.tokens, "heldout": prose.heldout.tokens}
    assert metrics["tokens"] == sum(d.train.tokens + d.heldout.tokens for d in found.domains.values())
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
        assert row["doc_id"] == build.doc_id(by_row[row["row"]])
    together = datasets.concatenate_datasets(
        [datasets.Dataset.from_file(str(corpus / s.path)) for s in manifest.load(corpus).domains["prose"].train.shards]
    )
    assert sum(map(len, together["input_ids"])) == manifest.load(corpus).domains["prose"].train.tokens


def test_a_shard_is_one_uncompressed_batch_that_maps_without_a_copy(corpus: Path) -> None:
    shard = manifest.load(corpus).domains["code"].train.shards[0]
    before = pa.total_allocated_bytes()
    ids = shards.flat_ids(shards.open_shard(corpus / shard.path))
    assert pa.total_allocated_bytes() == before
    assert ids.dtype == "uint16"
    assert ids.flags.owndata is False


def test_documents_are_shuffled_by_the_seed_and_the_same_set_is_held_out(corpus: Path, project: Project) -> None:
    def ids(split: str) -> list[bytes]:
        paths = sorted((corpus / "prose" / split).glob("*.arrow"))
        return [i for path in paths for i in shards.open_shard(path).column("doc_id").to_pylist()]

    first = {split: ids(split) for split in build.SPLITS}
    rows = shards.open_shard(corpus / "prose/train/part-00000.arrow").column("row").to_pylist()
    assert rows != sorted(rows)
    raw = json.loads(Path("pipelines.yaml").read_text())
    raw["corpora"]["tiny"]["seed"] = 5
    Path("pipelines.yaml").write_text(json.dumps(raw))
    run()
    for split in build.SPLITS:
        assert ids(split) != first[split]
        assert sorted(ids(split)) == sorted(first[split])


def test_hold_out_does_not_depend_on_the_order_of_documents() -> None:
    texts = sentences(2000, seed=3)
    held = {text for text in texts if build.is_heldout(build.doc_id(text), 0.1)}
    assert held == {text for text in reversed(texts) if build.is_heldout(build.doc_id(text), 0.1)}
    assert 150 < len(held) < 250
    assert held <= {text for text in texts if build.is_heldout(build.doc_id(text), 0.2)}


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
    with pytest.raises(sources.SourceError, match=r"sources changed .*\(code\); run again with --refresh"):
        stage.make("tiny")
    before = manifest.load(corpus).sha256
    run()
    assert manifest.load(corpus).sha256 != before


def test_without_fingerprints_the_stage_says_which_command_makes_them(project: Project, tmp_path: Path) -> None:
    project({"a": {"source": jsonl(tmp_path / "a.jsonl", sentences(9, seed=1))}})
    with pytest.raises(sources.SourceError, match=r"python -m tasks.corpus.fingerprint tiny"):
        stage.make("tiny")


@pytest.mark.parametrize(("heldout", "split"), [(0.0, "heldout"), (0.999999, "train")])
def test_a_domain_without_documents_in_a_split_is_an_error(
    project: Project, tmp_path: Path, heldout: float, split: str
) -> None:
    project({"prose": {"source": jsonl(tmp_path / "a.jsonl", sentences(30, seed=6)), "heldout": heldout}})
    with pytest.raises(CorpusError, match=rf"domain prose: no document for the {split} split.*30 documents kept") as e:
        run()
    assert f"heldout = {heldout}" in str(e.value)


def test_bad_lines_above_the_share_stop_the_domain_and_below_it_are_reported(project: Project, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in sentences(99, seed=7)]
    lines.insert(50, '{"text": "torn')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    domain = {"source": f"dir:{tmp_path}/a.jsonl.gz"}
    project({"prose": domain}, max_bad=0.001)
    with pytest.raises(CorpusError, match=r"domain prose: 1 of 100 records are bad \(1.00%\).*a.jsonl.gz, row 50"):
        run()
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
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    jsonl(good, sentences(100, seed=8))
    bad.write_text(good.read_text().replace("100", "x") + "{\n" * 50)
    jsonl(bad, sentences(400, seed=9))
    with bad.open("a") as file:
        file.write("{\n" * 5)
    root = project({"good": {"source": f"dir:{good}"}, "bad": {"source": f"dir:{bad}"}}, shard_tokens=2000)
    monkeypatch.setattr(build, "BATCH_CHARS", 5000)
    with pytest.raises(CorpusError, match="domain bad: 5 of 405"):
        run()
    encoded: list[str] = []
    encode = encoder.Encoder.encode
    monkeypatch.setattr(encoder.Encoder, "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    with pytest.raises(CorpusError, match="domain bad: 5 of 405"):
        run()
    assert not set(encoded) & set(sentences(100, seed=8))
    assert len(encoded) < 100  # of 400: the parts that were committed stay
    assert not (root / "data/corpora/tiny").exists()


KILLER = """
import os, runpy, signal, sys
left, real = int(sys.argv.pop()), {"replace": os.replace, "rename": os.rename}
def dying(name):
    def call(*a, **k):
        global left
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        real[name](*a, **k)
    return call
os.replace, os.rename = dying("replace"), dying("rename")
sys.argv = ["tasks.corpus", "tiny"]
runpy.run_module("tasks.corpus", run_name="__main__")
"""


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"}
    return subprocess.Popen([sys.executable, *arguments], env=environment, stderr=subprocess.PIPE)


def test_killed_at_any_rename_and_run_again_gives_the_bytes_of_a_clean_run(corpus: Path) -> None:
    clean, metrics = scratch.digest(corpus), json.loads(corpus.with_name("tiny.json").read_text())
    shutil.rmtree(corpus)
    for deaths in range(60):
        # Each run gets a few renames further than the one before; the last has only three to make.
        process = _start("-c", KILLER, str(2 + deaths % 3))
        _, errors = process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0, errors.decode()
    assert deaths > 5
    assert scratch.digest(corpus) == clean
    again = json.loads(corpus.with_name("tiny.json").read_text())
    assert again["sha256"] == metrics["sha256"]
    assert again["domains"]["code"]["rules"] == metrics["domains"]["code"]["rules"]


def test_killed_at_random_moments_and_run_again_gives_the_bytes_of_a_clean_run(corpus: Path) -> None:
    clean = scratch.digest(corpus)
    shutil.rmtree(corpus)
    rng = random.Random(0)
    for _ in range(5):
        process = _start("-m", "tasks.corpus", "tiny")
        time.sleep(rng.uniform(0.3, 1.2))  # the interpreter alone takes about 0.3 s
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = _start("-m", "tasks.corpus", "tiny")
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert scratch.digest(corpus) == clean
    assert not list(Path(".scratch/corpus-tiny").glob("*/"))  # nothing left but the lock


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
