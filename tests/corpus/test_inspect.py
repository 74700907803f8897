from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tasks.corpus import encoder, inspect, manifest, shards

from .texts import sentences

ROOT = Path(__file__).parents[2]


def test_a_whole_corpus_has_no_problems(corpus: Path) -> None:
    assert inspect.verify_corpus(corpus) == []


def shard_of(corpus_dir: Path) -> Path:
    return corpus_dir / "code/train/part-00000.arrow"


def rewrite(corpus_dir: Path, change: str) -> None:
    """Write the first shard again with other ids, and a manifest that agrees with it."""
    path = shard_of(corpus_dir)
    batch = shards.open_shard(path)
    documents = [np.array(ids, dtype=np.uint16) for ids in batch.column("input_ids").to_pylist()]
    identities = batch.column("doc_id").to_pylist()
    if change == "id":
        documents[3][1] = 60000
    elif change == "eos":
        documents[2][-1] = 5
    elif change == "duplicate":
        identities[1] = identities[0]
    rows = [
        shards.Row(ids=ids, doc_id=identity, source="a", row=i, text_bytes=1)
        for i, (ids, identity) in enumerate(zip(documents, identities, strict=True))
    ]
    metadata = {key.decode(): value.decode() for key, value in batch.schema.metadata.items()}
    sidecar = shards.write(path, rows, dtype=np.uint16, metadata=metadata)
    raw = json.loads((corpus_dir / manifest.FILE).read_text())
    raw["domains"]["code"]["train"]["shards"][0] = sidecar
    (corpus_dir / manifest.FILE).write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("id", "id 60000 is outside the vocabulary of 400"),
        ("eos", r"1 documents don't end with EOS \(0\), the first at row 2"),
        ("duplicate", "row 1 is a document that .*part-00000.arrow holds already"),
    ],
)
def test_wrong_content_is_found_behind_right_hashes(corpus: Path, change: str, problem: str) -> None:
    rewrite(corpus, change)
    (found,) = inspect.verify_corpus(corpus)
    assert found.startswith(f"{shard_of(corpus)}: ")
    assert re.search(problem, found)


def test_damage_is_named_with_its_file(corpus: Path) -> None:
    path = shard_of(corpus)
    content = path.read_bytes()

    path.write_bytes(content[:-100])
    assert inspect.verify_corpus(corpus) == [
        f"{path}: {len(content) - 100} bytes, the manifest says {len(content)}; it was cut short or replaced"
    ]
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(flipped)
    assert any(text.startswith(f"{path}: sha256 is ") for text in inspect.verify_corpus(corpus))
    path.unlink()
    assert inspect.verify_corpus(corpus) == [f"{path}: missing"]
    path.write_bytes(content)

    sidecar = shards.sidecar_of(path)
    written = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**written, "tokens": 1}))
    assert inspect.verify_corpus(corpus) == [
        f"{path}: its sidecar part-00000.json differs from the manifest in tokens"
    ]
    sidecar.unlink()
    assert inspect.verify_corpus(corpus) == [f"{path}: its sidecar part-00000.json is missing"]
    sidecar.write_text(json.dumps(written))

    foreign = path.with_name("notes.txt")
    foreign.write_text("?")
    assert inspect.verify_corpus(corpus) == [f"{foreign}: foreign file, the manifest doesn't list it"]
    foreign.unlink()
    assert inspect.verify_corpus(corpus) == []


def test_a_shard_cut_at_its_batch_is_refused_by_readers(corpus: Path) -> None:
    import pyarrow as pa

    path = shard_of(corpus)
    batch = shards.open_shard(path)
    with pa.OSFile(str(path.with_name("empty.arrow")), "wb") as sink, pa.ipc.new_stream(sink, batch.schema):
        pass
    with pytest.raises(ValueError, match=r"empty.arrow: holds 0 record batches"):
        shards.open_shard(path.with_name("empty.arrow"))
    path.with_name("text.arrow").write_text("not arrow")
    with pytest.raises(ValueError, match=r"text.arrow: not a readable shard"):
        shards.open_shard(path.with_name("text.arrow"))


def test_a_manifest_that_cannot_be_read_is_the_problem(corpus: Path) -> None:
    (corpus / manifest.FILE).write_text('{"format": 1}')
    (found,) = inspect.verify_corpus(corpus)
    assert found.startswith(f"{corpus / manifest.FILE}: ")
    (corpus / manifest.FILE).unlink()
    (found,) = inspect.verify_corpus(corpus)
    assert "not found; make the corpus with `python -m tasks.corpus tiny`" in found


def test_a_shard_is_described_with_provenance_and_its_first_text(corpus: Path) -> None:
    found = inspect.describe_shard(shard_of(corpus))
    shard = manifest.load(corpus).domains["code"].train.shards[0]
    assert (found["documents"], found["tokens"], found["domain"]) == (shard.documents, shard.tokens, "code")
    first = found["first_document"]
    assert first["source"] == "code.jsonl"
    text = sentences(200, seed=2)[first["row"]]
    assert text.startswith(first["text"].removesuffix("<|endoftext|>"))
    assert json.dumps(found)


def test_a_corpus_is_described_with_counts_licences_and_first_text(corpus: Path) -> None:
    found = inspect.describe_manifest(corpus)
    assert found["sha256"] == manifest.load(corpus).sha256
    assert found["domains"]["prose"]["license"] == "CC-BY-4.0"
    assert found["domains"]["prose"]["first_text"][:2] == "1-"
    assert json.dumps(found)
    Path("data/models/small").unlink()
    assert inspect.describe_manifest(corpus)["domains"]["prose"]["first_text"] is None


def test_a_foreign_arrow_file_is_no_shard(tmp_path: Path) -> None:
    import pyarrow as pa

    batch = pa.record_batch({"text": ["a"]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(ValueError, match="no shard, it lacks the columns doc_id, input_ids, row, source"):
        inspect.describe_shard(tmp_path / "a.arrow")


def test_a_model_with_another_tokenizer_is_refused(corpus: Path, tmp_path: Path, sentencepiece: Path) -> None:
    found = manifest.load(corpus)
    manifest.require_tokenizer(found, Path("data/models/small"))
    with pytest.raises(ValueError, match=r"its tokenizer is .* but corpus tiny was tokenised with .*model small"):
        manifest.require_tokenizer(found, sentencepiece)
    copy = Path(shutil.copytree("data/models/small", tmp_path / "copy"))
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": "the"}))
    assert encoder.load_encoder(copy).eos_token_id != 0
    with pytest.raises(ValueError, match="its tokenizer is"):
        manifest.require_tokenizer(found, copy)


def test_the_command_line_verifies_and_exits_with_the_verdict(corpus: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tasks.corpus.inspect", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    good = call("--verify", str(corpus))
    assert (good.returncode, good.stdout) == (0, f"{corpus}: whole\n")
    assert json.loads(call(str(corpus)).stdout)["corpus"] == "tiny"
    shards.sidecar_of(shard_of(corpus)).unlink()
    bad = call("--verify", str(corpus))
    assert bad.returncode == 1
    assert "is missing" in bad.stdout
