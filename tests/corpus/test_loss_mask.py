"""A reader that gives token ids and loss masks: its targets reach the batches, and no other token is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from tasks.corpus import manifest, shards
from tasks.corpus.readers.base import FileReader, Piece, Records
from tasks.corpus.readers.registry import READERS
from tasks.corpus.records import Document
from tasks.corpus.sampling.loader import IGNORED, Loader, train_windows
from tasks.corpus.sampling.packing import Packing
from tasks.corpus.sampling.sampler import Sampler
from tasks.tools import repair_corpus
from tests.corpus.texts import Project, run

SEQ_LEN = 16


class ChatReader(FileReader):
    """A question, which is no target, and an answer, on a line each: {"question": [ids], "answer": [ids]}."""

    has_ids = True

    def records(self, file: IO[bytes], piece: Piece) -> Records:
        row = -1
        for row, line in enumerate(file):
            chat = json.loads(line)
            ids = np.array(chat["question"] + chat["answer"])
            mask = np.arange(len(ids)) >= len(chat["question"])
            yield Document(text="", source=piece.path, row=row, ids=ids, loss_mask=mask)
        return row + 1


@pytest.fixture
def chats(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of chats: ids up to 99 are of questions, and ids from 100 on of answers."""
    rng = np.random.default_rng(0)
    lines = [
        {"question": rng.integers(1, 100, 3 + i % 5).tolist(), "answer": rng.integers(100, 250, 2 + i % 7).tolist()}
        for i in range(80)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setitem(READERS, "jsonl", ChatReader)
    corpus = project({"chat": {"source": f"dir:{tmp_path}/chats.jsonl"}}, shard_tokens=200)
    run()
    return corpus


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("mask_documents", [False, True])
def test_only_answers_and_their_ends_are_targets(chats: Path, packing: Packing, mask_documents: bool) -> None:
    windows = train_windows(chats, ["chat"], seq_len=SEQ_LEN, packing=packing)
    sha256 = manifest.load(chats).sha256
    sampler = Sampler(windows, weights={"chat": 1.0}, seed=0, batch=4, corpus_sha256=sha256, packing=packing)
    loader = Loader(
        chats,
        sampler,
        seq_len=SEQ_LEN,
        rank=0,
        world_size=1,
        packing=packing,
        mask_documents=mask_documents,
        prefetch=0,
    )
    for _ in range(4):
        batch = loader.next()
        targets = batch.labels != IGNORED
        assert (batch.labels[targets] == batch.input_ids[targets]).all()
        assert not (targets & (batch.input_ids > 0) & (batch.input_ids < 100)).any()
        first = np.zeros_like(targets)
        first[:, 0] = True
        if mask_documents:
            first.reshape(-1)[batch.cu_seqlens[:-1]] = True
        assert (targets | first)[batch.input_ids >= 100].all()
        assert batch.step_targets == (targets & ~first).sum()  # a row's first token has nothing before it


def test_a_shard_with_a_mask_is_made_again_byte_for_byte(chats: Path) -> None:
    path = min(chats.glob("chat/train/*.arrow"))
    assert shards.loss_mask(shards.open_shard(path)) is not None
    content = path.read_bytes()
    path.unlink()
    assert repair_corpus.repair(chats) == []
    assert path.read_bytes() == content


def test_a_corpus_without_masks_has_no_such_column(corpus: Path) -> None:
    assert all(shards.loss_mask(shards.open_shard(path)) is None for path in corpus.glob("*/train/*.arrow"))
