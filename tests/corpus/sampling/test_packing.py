from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.corpus.sampling.packing import Bins, cached, pack

Piece = tuple[int, int]  # first token, tokens
KEY = {"corpus": "c0ffee", "domain": "prose", "split": "train", "seq_len": "16"}


def as_lists(bins: Bins) -> list[list[Piece]]:
    pieces = list(zip(bins.start.tolist(), bins.length.tolist(), strict=True))
    return [pieces[a:b] for a, b in zip(bins.offsets[:-1], bins.offsets[1:], strict=True)]


def best_fit_decreasing(lengths: list[int], seq_len: int) -> list[list[Piece]]:
    """The oracle: look at every bin for every piece."""
    pieces, position = [], 0
    for n in lengths:
        pieces += [(position + at, min(seq_len, n - at)) for at in range(0, n, seq_len)]
        position += n
    bins: list[list[Piece]] = []
    touched: list[int] = []
    for turn, piece in enumerate(sorted(pieces, key=lambda piece: -piece[1])):  # stable
        rooms = [seq_len - sum(n for _, n in some) for some in bins]
        fitting = [(room, touched[i], i) for i, room in enumerate(rooms) if room >= piece[1]]
        if fitting:
            chosen = min(fitting)[2]
            bins[chosen].append(piece)
            touched[chosen] = turn
        else:
            bins.append([piece])
            touched.append(turn)
    return bins


lengths_and_windows = st.integers(1, 40).flatmap(
    lambda seq_len: st.tuples(st.lists(st.integers(1, 3 * seq_len), max_size=80), st.just(seq_len))
)


@given(lengths_and_windows)
@example(([], 5))
@example(([1] * 30, 7))
@example(([5, 5, 2, 2, 2, 1], 5))
@settings(deadline=None, max_examples=100)
def test_bins_are_those_of_best_fit_decreasing_by_trying_every_bin(case: tuple[list[int], int]) -> None:
    lengths, seq_len = case
    result = as_lists(pack(np.array(lengths, dtype=np.int32), seq_len=seq_len))
    assert result == best_fit_decreasing(lengths, seq_len)


@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 3000), mean=st.floats(1, 7), seq_len=st.sampled_from([64, 1000])
)
@settings(deadline=None, max_examples=15)
def test_each_token_is_in_one_bin_and_only_documents_longer_than_a_window_are_cut(
    seed: int, count: int, mean: float, seq_len: int
) -> None:
    lengths = 1 + np.random.default_rng(seed).lognormal(mean, 1.0, count).astype(np.int32)
    bins = pack(lengths, seq_len=seq_len)
    assert np.add.reduceat(bins.length, bins.offsets[:-1]).max() <= seq_len
    order = np.argsort(bins.start)
    start, stop = bins.start[order], (bins.start + bins.length)[order]
    assert start[0] == 0
    assert stop[-1] == lengths.sum()
    assert np.array_equal(start[1:], stop[:-1])
    edges = np.concatenate([[0], lengths.cumsum()])
    assert set(edges[:-1]) <= set(start)
    cuts = np.setdiff1d(start, edges)
    document = np.searchsorted(edges, cuts, side="right") - 1
    assert not np.any((cuts - edges[document]) % seq_len)  # whole chunks first
    emptiest = np.sort(np.add.reduceat(bins.length, bins.offsets[:-1]))[:2]
    assert len(bins) == 1 or emptiest.sum() > seq_len  # else the pieces of one had gone into the other


def built(bins: Bins) -> tuple[list[int], ...]:
    return bins.offsets.tolist(), bins.start.tolist(), bins.length.tolist()


def some_bins() -> Bins:
    return pack(np.arange(1, 60, dtype=np.int32), seq_len=16)


def never() -> Bins:
    raise AssertionError("built again")


def test_bins_that_are_kept_are_mapped_and_not_built_again(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/prose-train-16.arrow"
    first = cached(path, some_bins, key=KEY)
    again = cached(path, never, key=KEY)
    assert built(first) == built(again) == built(some_bins())
    assert not again.start.flags.owndata
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_documents_give_no_bins_from_the_file_too(tmp_path: Path) -> None:
    none = cached(tmp_path / "none.arrow", lambda: pack(np.array([], dtype=np.int32), seq_len=8), key=KEY)
    assert len(none) == 0


@pytest.mark.parametrize(
    "change", [{"corpus": "bad"}, {"domain": "code"}, {"split": "test"}, {"seq_len": "17"}], ids=str
)
def test_bins_of_another_corpus_or_length_are_built_anew(tmp_path: Path, change: dict[str, str]) -> None:
    path = tmp_path / "bins.arrow"
    cached(path, lambda: pack(np.array([3, 4], dtype=np.int32), seq_len=16), key={**KEY, **change})
    assert built(cached(path, some_bins, key=KEY)) == built(some_bins())
    assert built(cached(path, never, key=KEY)) == built(some_bins())


def test_a_file_cut_or_changed_anywhere_is_built_anew(tmp_path: Path) -> None:
    path = tmp_path / "bins.arrow"
    expected = built(cached(path, some_bins, key=KEY))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(0, len(whole), 97), len(whole) - 1]
    damaged = [whole[:n] for n in places]
    damaged += [whole[:n] + bytes([whole[n] ^ (1 << rng.integers(8))]) + whole[n + 1 :] for n in places]
    for content in [b"not Arrow at all", *damaged]:
        path.write_bytes(content)
        assert built(cached(path, some_bins, key=KEY)) == expected


def build(path: Path, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    assert built(cached(path, some_bins, key=KEY)) == built(some_bins())


def test_processes_that_build_at_once_find_the_same_whole_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    path = tmp_path / "bins.arrow"
    workers = [context.Process(target=build, args=(path, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
