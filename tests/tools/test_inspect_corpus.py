from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from tasks.corpus import manifest
from tasks.corpus.tokenizer import encoder
from tasks.tools import inspect_corpus as inspect
from tests.corpus.texts import sentences


def shard_of(corpus_dir: Path) -> Path:
    return corpus_dir / "code/train/part-00000-000.arrow"


def test_a_shard_is_described_with_provenance_and_its_first_text(corpus: Path) -> None:
    result = inspect.describe_shard(shard_of(corpus))
    shard = manifest.load(corpus).domains["code"].train.shards[0]
    assert (result["documents"], result["tokens"], result["domain"]) == (shard.documents, shard.tokens, "code")
    first = result["first_document"]
    assert first["source"] == "code.jsonl"
    text = sentences(200, seed=2)[first["row"]]
    assert text.startswith(first["text"].removesuffix("<|endoftext|>"))
    assert json.dumps(result)


def test_a_corpus_is_described_with_counts_licences_and_first_text(corpus: Path) -> None:
    result = inspect.describe_manifest(corpus)
    assert result["sha256"] == manifest.load(corpus).sha256
    assert result["domains"]["prose"]["license"] == "CC-BY-4.0"
    assert result["domains"]["prose"]["first_text"][:2] == "1-"
    assert json.dumps(result)
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
    result = manifest.load(corpus)
    manifest.require_tokenizer(result, Path("data/models/small"))
    with pytest.raises(ValueError, match=r"its tokenizer is .* but corpus tiny was tokenised with .*model small"):
        manifest.require_tokenizer(result, sentencepiece)
    copy = Path(shutil.copytree("data/models/small", tmp_path / "copy"))
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": "the"}))
    assert encoder.load_encoder(copy).eos_token_id != 0
    with pytest.raises(ValueError, match="its tokenizer is"):
        manifest.require_tokenizer(result, copy)


def test_the_command_prints_a_description_or_one_line_and_fails(corpus: Path, tmp_path: Path) -> None:
    assert json.loads(CliRunner().invoke(app, ["inspect", str(corpus)]).output)["corpus"] == "tiny"
    (tmp_path / "nothing.arrow").touch()
    bad = CliRunner().invoke(app, ["inspect", str(tmp_path / "nothing.arrow")])
    assert bad.exit_code == 1
    assert f"{tmp_path}/nothing.arrow: no sound shard: " in bad.output
