"""A small byte-level tokenizer, a SentencePiece-like one, and projects of one corpus."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.corpus.texts import jsonl, run, sentences


def _save(tokenizer: Tokenizer, folder: Path, *, eos: str) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size()}))
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a byte-level BPE tokenizer of vocabulary 400; <|endoftext|> is its EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(300, seed=99), trainer)
    return _save(tokenizer, tmp_path_factory.mktemp("byte-level"), eos="<|endoftext|>")


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a LLaMA-2-like tokenizer: ▁ for spaces, bytes as <0x..>, </s> as EOS."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = special + [f"<0x{i:02X}>" for i in range(256)] + list("▁abcdefghijklmnopqrstuvwxyzK.:-0123456789")
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    return _save(tokenizer, tmp_path_factory.mktemp("sentencepiece"), eos="</s>")


@pytest.fixture
def project(tmp_path: Path, byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a project with one corpus `tiny` and change into it: project(domains={name: {...}}, **corpus knobs)."""

    def make(domains: dict[str, dict[str, Any]], **knobs: Any) -> Path:
        (tmp_path / "data/models").mkdir(parents=True, exist_ok=True)
        model = tmp_path / "data/models/small"
        if not model.exists():
            model.symlink_to(byte_level)
        for entry in domains.values():
            entry.setdefault("format", "jsonl")
            entry.setdefault("license", "CC0-1.0")
        corpus = {"model": "small", "heldout": 0.2, **knobs, "domains": domains}
        content = {
            "models": {"small": {"source": f"dir:{byte_level}", "license": "CC0-1.0"}},
            "corpora": {"tiny": corpus},
            "pipelines": {},
        }
        (tmp_path / "pipelines.yaml").write_text(json.dumps(content))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


@pytest.fixture
def corpus(project: Callable[..., Path], tmp_path: Path) -> Path:
    """Two domains, several parts each, made whole."""
    two = {
        "prose": {"source": jsonl(tmp_path / "prose.jsonl", sentences(300, seed=1)), "license": "CC-BY-4.0"},
        "code": {"source": jsonl(tmp_path / "code.jsonl", sentences(200, seed=2))},
    }
    root = project(two, shard_tokens=3000)
    run()
    return root / "data/corpora/tiny"
