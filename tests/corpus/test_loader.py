from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tasks.corpus import manifest, shards, windows
from tasks.corpus.loader import Loader, train_windows
from tasks.corpus.sampler import Sampler
from tasks.corpus.windows import Windows

SEQ_LEN = 64
WEIGHTS = {"prose": 0.7, "code": 0.3}


def stream(corpus_dir: Path, domain: str, split: str) -> np.ndarray:
    """The oracle: all ids of a split in one array."""
    entry = getattr(manifest.load(corpus_dir).domains[domain], split)
    batches = [shards.open_shard(corpus_dir / shard.path) for shard in entry.shards]
    return np.concatenate([[i for ids in batch.column("input_ids").to_pylist() for i in ids] for batch in batches])


def loader(corpus_dir: Path, *, rank: int = 0, world_size: int = 1, batch: int = 12) -> Loader:
    sampler = Sampler(
        train_windows(corpus_dir, list(WEIGHTS), seq_len=SEQ_LEN),
        weights=WEIGHTS,
        seed=0,
        batch=batch,
        corpus_sha256=manifest.load(corpus_dir).sha256,
    )
    return Loader(corpus_dir, sampler, seq_len=SEQ_LEN, rank=rank, world_size=world_size)


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000])  # 5000 tokens span shards of 3000
def test_windows_are_the_consecutive_pieces_of_the_concatenated_split(corpus: Path, seq_len: int) -> None:
    whole = stream(corpus, "prose", "train")
    found = Windows(corpus, "prose", "train", seq_len=seq_len)
    assert len(found) == len(whole) // seq_len
    for i in {0, 1 % len(found), len(found) // 2, len(found) - 1}:
        assert found[i].dtype == np.int64
        assert found[i].tolist() == whole[i * seq_len : (i + 1) * seq_len].tolist()


def test_a_window_outside_or_a_domain_unknown_is_an_error(corpus: Path) -> None:
    found = Windows(corpus, "prose", "train", seq_len=SEQ_LEN)
    for i in (-1, len(found)):
        with pytest.raises(IndexError, match=f"has {len(found)} windows of 64 tokens; there is no {i}"):
            found[i]
    with pytest.raises(ValueError, match="no domain 'poems'; it has code, prose"):
        Windows(corpus, "poems", "train", seq_len=SEQ_LEN)


def test_held_out_windows_are_spread_over_the_split_and_fewer_where_it_is_short(corpus: Path) -> None:
    found = windows.heldout(corpus, seq_len=SEQ_LEN, count=5)
    whole = stream(corpus, "code", "heldout")
    n = len(whole) // SEQ_LEN
    assert found["code"].shape == (5, SEQ_LEN)
    assert found["code"].dtype == np.int64
    for k, window in enumerate(found["code"]):
        i = k * n // 5
        assert window.tolist() == whole[i * SEQ_LEN : (i + 1) * SEQ_LEN].tolist()
    assert windows.heldout(corpus, seq_len=SEQ_LEN, count=10**6)["code"].shape == (n, SEQ_LEN)
    with pytest.raises(ValueError, match="shorter than one window of 99999 tokens; raise `heldout`"):
        windows.heldout(corpus, seq_len=99999, count=1)


def test_the_ranks_together_get_the_global_batch_and_each_row_is_its_window(corpus: Path) -> None:
    alone = loader(corpus)
    ranks = [loader(corpus, rank=rank, world_size=4) for rank in range(4)]
    served = {domain: Windows(corpus, domain, "train", seq_len=SEQ_LEN) for domain in WEIGHTS}
    for _ in range(25):
        expected, parts = alone.next(), [one.next() for one in ranks]
        for rank, part in enumerate(parts):
            assert part.input_ids.shape == (3, SEQ_LEN)
            assert part.input_ids.tolist() == expected.input_ids[rank::4].tolist()
            assert part.domains == expected.domains[rank::4]
        for row, domain, window in zip(expected.input_ids, expected.domains, expected.windows, strict=True):
            assert row.tolist() == served[domain][window].tolist()


def test_a_loader_continues_from_the_state_of_its_sampler_at_another_world_size(corpus: Path) -> None:
    straight = loader(corpus)
    for _ in range(7):
        straight.next()
    later = [loader(corpus, rank=rank, world_size=2) for rank in range(2)]
    for one in later:
        one.sampler.restore(straight.sampler.state())
    expected = straight.next().input_ids
    assert np.array_equal(np.stack([one.next().input_ids for one in later], axis=1).reshape(expected.shape), expected)


def test_a_batch_that_ranks_cannot_share_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match="batch = 12 is not a multiple of world_size = 5"):
        loader(corpus, world_size=5)
    with pytest.raises(ValueError, match="rank = 2 is not one of 0 to 1"):
        loader(corpus, rank=2, world_size=2)
