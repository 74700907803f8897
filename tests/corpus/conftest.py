"""A small byte-level tokenizer, a SentencePiece-like one, and projects of one corpus."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tasks import code
from tests.corpus.texts import CORPUS, Project, jsonl, run, sentences


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


_fingerprint = functools.cache(code.fingerprint)


@pytest.fixture(scope="module", autouse=True)
def _no_waiting() -> Iterator[None]:
    """No test cuts the power, and fsync takes most of the time of many small files; the code is digested once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(code, "fingerprint", _fingerprint)
        yield


def write_project(
    root: Path, model_dir: Path, domains: Mapping[str, dict[str, Any] | list[str]], **knobs: Any
) -> None:
    """Write the settings of a project with one corpus `tiny`, and its model. A domain is an entry, or its texts."""
    model = root / "data/models/small"
    model.parent.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        model.symlink_to(model_dir)
    entries = {}
    for name, domain in domains.items():
        entry = {"source": jsonl(root / f"{name}.jsonl", domain)} if isinstance(domain, list) else domain
        entries[name] = {"format": "jsonl", "license": "CC0-1.0", **entry}
    content = {
        "models": {"small": {"source": f"dir:{model_dir}", "license": "CC0-1.0"}},
        "corpora": {"tiny": {"model": "small", "heldout": 0.2, **knobs, "domains": entries}},
        "pipelines": {},
    }
    (root / "pipelines.yaml").write_text(json.dumps(content))


@pytest.fixture
def project(tmp_path: Path, byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Make a project with one corpus `tiny` and change into it; returns where the corpus will be.

    project({domain: its entry, or its texts}, **knobs of the corpus)
    """

    def make(domains: Mapping[str, Any], **knobs: Any) -> Path:
        write_project(tmp_path, byte_level, domains, **knobs)
        monkeypatch.chdir(tmp_path)
        return tmp_path / CORPUS

    return make


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory, byte_level: Path) -> Path:
    """A project whose corpus has two domains, several parts each. Tests take copies."""
    root = tmp_path_factory.mktemp("finished")
    two = {"prose": {"source": "dir:prose.jsonl", "license": "CC-BY-4.0"}, "code": {"source": "dir:code.jsonl"}}
    for seed, (name, count) in enumerate({"prose": 300, "code": 200}.items(), start=1):
        jsonl(root / f"{name}.jsonl", sentences(count, seed=seed))
    write_project(root, byte_level, two, shard_tokens=3000)
    with contextlib.chdir(root):
        run()
    return root


@pytest.fixture
def corpus(finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project's corpus; the test runs in its project."""
    return copied(finished_project, tmp_path, monkeypatch)


def copied(project: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a project and change into it; returns its corpus."""
    shutil.copytree(project, folder, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    return folder / CORPUS


def with_bos(model_dir: Path) -> None:
    """Have the project's model be a copy of another, with the token `!` as BOS."""
    model = Path("data/models/small")
    model.unlink()
    shutil.copytree(model_dir, model)
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": "!"}))
