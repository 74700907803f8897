from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli import app
from tasks.corpus import manifest, shards
from tasks.tools import shard_checks
from tasks.tools import verify_corpus as verify
from tests.corpus.conftest import with_bos
from tests.corpus.texts import Project, run, sentences


def shard_of(corpus_dir: Path) -> Path:
    return corpus_dir / "code/train/part-00000-000.arrow"


def change_manifest(corpus_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the manifest with a change, and metrics that agree with it."""
    path, metrics = corpus_dir / manifest.FILE, corpus_dir.with_name(f"{corpus_dir.name}.json")
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "sha256": sha256}))


def rewrite(corpus_dir: Path, change: str, *, name: str = "code/train/part-00000-000.arrow") -> None:
    """Write a shard again with a fault, and a manifest that agrees with it."""
    path = corpus_dir / name
    batch = shards.open_shard(path)
    documents = [np.array(ids, dtype=np.uint16) for ids in batch.column("input_ids").to_pylist()]
    identities = shards.doc_ids(batch).copy()
    metadata = {key.decode(): value.decode() for key, value in batch.schema.metadata.items()}
    domain, split, _ = Path(name).parts
    if change == "id":
        documents[3][1] = 60000
    elif change == "eos":
        documents[2][-1] = 5
    elif change == "empty":
        documents[1] = documents[1][:0]
    elif change == "twice":
        identities[1] = identities[0]
    elif change == "elsewhere":
        other = corpus_dir / "code/test/part-00000-000.arrow"
        identities[4] = shards.doc_ids(shards.open_shard(other))[2]
    elif change == "metadata":
        metadata["domain"] = "prose"
    part = shards.Part()
    part.append(
        np.concatenate(documents),
        np.cumsum([0, *map(len, documents)]),
        doc_ids=identities,
        sources=["a"] * len(documents),
        rows=np.arange(len(documents), dtype=np.uint64),
        text_bytes=json.loads(shards.sidecar_of(path).read_text())["text_bytes"],
    )
    order = np.arange(len(documents))
    sidecar = shards.write(path, part, order=order, dtype=np.uint16, metadata=metadata)

    def agree(raw: dict[str, Any]) -> None:
        entry = raw["domains"][domain][split]
        entry["shards"] = [sidecar if shard["path"] == sidecar["path"] else shard for shard in entry["shards"]]
        entry["tokens"] = sum(shard["tokens"] for shard in entry["shards"])

    change_manifest(corpus_dir, agree)


def test_a_corpus_as_the_stage_made_it_has_no_problems(corpus: Path) -> None:
    assert verify.verify_corpus(corpus) == []
    assert verify.verify_shard(shard_of(corpus)) == []


def test_a_bit_flipped_anywhere_is_found_and_its_file_named(corpus: Path) -> None:
    rng = random.Random(0)
    paths = [path for path in sorted(corpus.rglob("*")) if path.is_file()]
    assert len(paths) > 15
    for path in paths:
        content = path.read_bytes()
        for _ in range(2):
            flipped = bytearray(content)
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            assert any(text.startswith(f"{path}: ") for text in verify.verify_corpus(corpus)), path
        path.write_bytes(content)
    assert verify.verify_corpus(corpus) == []


def test_a_manifest_without_metrics_beside_it_must_agree_with_what_it_lists(corpus: Path) -> None:
    corpus.with_name("tiny.json").unlink()
    path = corpus / manifest.FILE
    lines = path.read_text().splitlines(keepends=True)
    # Of the seed, the licence and where a domain came from, only the metrics know.
    unchecked = re.compile('"(seed|source|license)"')
    numbered = [i for i, line in enumerate(lines) if re.search(r"\d", line) and not unchecked.search(line)]
    rng = random.Random(1)
    for i in rng.sample(numbered, 25):
        place = rng.choice([match.start() for match in re.finditer(r"\d", lines[i])])
        changed = lines[i][:place] + str(int(lines[i][place]) ^ 1) + lines[i][place + 1 :]
        path.write_text("".join([*lines[:i], changed, *lines[i + 1 :]]))
        assert verify.verify_corpus(corpus), changed
    path.write_text("".join(lines))
    assert verify.verify_corpus(corpus) == []


def test_damage_is_told_with_what_was_expected(corpus: Path) -> None:
    path = shard_of(corpus)
    content = path.read_bytes()

    path.write_bytes(content[:-100])
    assert verify.verify_corpus(corpus) == [
        f"{path}: {len(content) - 100} bytes, the manifest says {len(content)}; it was cut short or replaced"
    ]
    path.unlink()
    assert verify.verify_corpus(corpus) == [f"{path}: missing"]
    path.symlink_to("gone")
    assert verify.verify_corpus(corpus) == [f"{path}: missing (a link to gone, where nothing is)"]
    path.unlink()
    path.write_bytes(content)

    sidecar = shards.sidecar_of(path)
    written = sidecar.read_text()
    sidecar.write_text(json.dumps({**json.loads(written), "tokens": 1}))
    assert verify.verify_corpus(corpus) == [f"{sidecar}: differs from the manifest in tokens"]
    sidecar.write_text(written.replace("\n", " "))
    assert verify.verify_corpus(corpus) == [f"{sidecar}: differs from the manifest in its layout, or has more fields"]
    sidecar.unlink()
    assert verify.verify_corpus(corpus) == verify.verify_shard(path) == [f"{sidecar}: missing"]
    sidecar.write_text(written)

    unlisted = path.with_name("notes.txt")
    unlisted.write_text("?")
    assert verify.verify_corpus(corpus) == [f"{unlisted}: unlisted file, the manifest doesn't list it"]
    assert verify.verify_shard(unlisted) == [f"{unlisted}: unlisted file, the manifest doesn't list it"]
    unlisted.unlink()

    verdicts = corpus / "verdicts/code/task-00000.arrow"
    verdicts.unlink()
    assert verify.verify_corpus(corpus) == [f"{verdicts}: missing"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("id", "id 60000 is outside the vocabulary of 400"),
        ("eos", r"1 documents don't end with EOS \(0\), the first at row 2"),
        ("empty", "documents don't cover its ids, or one has none"),
        ("twice", "1 documents stand in the corpus before, the first at row 1 in .*code/train/part-00000-000.arrow"),
        ("metadata", "domain in its schema is prose, the manifest says code"),
    ],
)
def test_wrong_content_is_found_behind_right_hashes(corpus: Path, change: str, problem: str) -> None:
    rewrite(corpus, change)
    (result,) = verify.verify_corpus(corpus)
    assert result.startswith(f"{shard_of(corpus)}: ")
    assert re.search(problem, result)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 24])
def test_documents_that_stand_twice_are_found_however_many_ids_are_sorted_at_once(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    rewrite(corpus, "twice", name="prose/train/part-00000-001.arrow")
    rewrite(corpus, "elsewhere")
    monkeypatch.setattr(shard_checks, "SORTED_AT_ONCE", at_once)
    text = "1 documents stand in the corpus before, the first at row"
    test, prose = corpus / "code/test/part-00000-000.arrow", corpus / "prose/train/part-00000-001.arrow"
    assert sorted(verify.verify_corpus(corpus)) == [
        f"{test}: {text} 2 in {shard_of(corpus)}",
        f"{prose}: {text} 1 in {prose}",
    ]


def test_counts_must_add_up(corpus: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["domains"]["code"]["train"]["tokens"] += 1
        raw["domains"]["prose"]["rules"]["empty"] += 1
        raw["domains"]["prose"]["rules"]["read"] += 1

    change_manifest(corpus, change)
    first, second = verify.verify_corpus(corpus)
    assert first.startswith(f"{corpus / manifest.FILE}: the train shards of code hold (")
    assert "rules of prose are" in second
    assert "the verdicts say" in second


def test_a_manifest_that_its_metrics_do_not_name_is_a_problem(corpus: Path) -> None:
    path = corpus / manifest.FILE
    raw = json.loads(path.read_text())
    raw["domains"]["code"]["license"] = "WTFPL"
    path.write_text(json.dumps(raw))
    (result,) = verify.verify_corpus(corpus)
    assert re.fullmatch(
        rf"{path}: sha256 is \w+, {corpus}.json says \w+; one of them is damaged or of another run", result
    )
    corpus.with_name("tiny.json").write_text("[]")
    (result,) = verify.verify_corpus(corpus)
    assert "tiny.json says nothing that can be read" in result


@pytest.mark.parametrize("content", ['{"format": 1}', '{"format": 3}', "[]", "{", '{"format": 3, "domains": []}', "ÿ"])
def test_a_manifest_that_cannot_be_read_is_the_only_problem(corpus: Path, content: str) -> None:
    (corpus / manifest.FILE).write_bytes(content.encode("latin-1"))
    (result,) = verify.verify_corpus(corpus)
    assert result.startswith(f"{corpus / manifest.FILE}: ")
    assert verify.verify_shard(shard_of(corpus)) == [result]


def test_a_folder_without_a_manifest_says_how_to_make_one(corpus: Path) -> None:
    (corpus / manifest.FILE).unlink()
    (result,) = verify.verify_corpus(corpus)
    assert "not found; make the corpus with `python -m tasks.corpus tiny`" in result


def test_a_shard_listed_under_another_split_is_a_fault_of_the_manifest(corpus: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        entry = raw["domains"]["code"]
        entry["train"], entry["test"] = entry["test"], entry["train"]

    change_manifest(corpus, change)
    (corpus / "code/test/part-00000-000.arrow").unlink()
    assert (
        f"{corpus / manifest.FILE}: lists code/test/part-00000-000.arrow as a train shard of code, "
        "whose name is another"
    ) in verify.verify_corpus(corpus)


def test_separators_are_looked_for_where_the_corpus_has_them(project: Project, byte_level: Path) -> None:
    corpus_dir = project({"a": sentences(60, seed=1)}, separators="bos_eos")
    with_bos(byte_level)
    run()
    made = manifest.load(corpus_dir)
    assert made.bos_token_id
    assert verify.verify_corpus(corpus_dir) == []

    change_manifest(corpus_dir, lambda raw: raw.update(bos_token_id=7, eos_token_id=8))
    problems = verify.verify_corpus(corpus_dir)
    for split in manifest.SPLITS:
        start = f"{corpus_dir}/a/{split}/part-00000-000.arrow: {made.domains['a'].splits[split].documents} documents"
        assert f"{start} don't begin with BOS (7), the first at row 0" in problems
        assert f"{start} don't end with EOS (8), the first at row 0" in problems
    assert len(problems) == 6


def test_the_command_exits_with_the_verdict(corpus: Path) -> None:
    good = CliRunner().invoke(app, ["verify", str(corpus)])
    assert (good.exit_code, good.output) == (0, f"{corpus}: sound\n")
    shards.sidecar_of(shard_of(corpus)).unlink()
    bad = CliRunner().invoke(app, ["verify", str(corpus)])
    assert bad.exit_code == 1
    assert f"{shards.sidecar_of(shard_of(corpus))}: missing\n" in bad.output
