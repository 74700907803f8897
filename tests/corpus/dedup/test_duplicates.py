"""Duplicates on disk against a reference that compares every pair."""

from __future__ import annotations

import itertools
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.dedup import duplicates
from tasks.corpus.dedup.duplicates import DUPLICATE, KEPT, NEAR_DUPLICATE
from tasks.corpus.records import CorpusError
from tasks.settings.corpus import NearDuplicates

Documents = list[tuple[bytes, list[int]]]  # doc_id, band hashes


def write(path: Path, ids: Any, bands: Any, *, batches: int = 1) -> Path:
    """A chunk of uint8 [n, 16] ids and uint64 [n, bands] band hashes, among other columns."""
    n = len(ids)
    columns = {
        "text": pa.array([f"text {i}" for i in range(n)]),
        "doc_id": fixed(np.ascontiguousarray(ids, dtype=np.uint8)),
    }
    if bands is not None:
        columns["bands"] = fixed(np.ascontiguousarray(bands, dtype="<u8").view(np.uint8))
    table = pa.table(columns)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=max(-(-n // batches), 1))
    return path


def fixed(values: np.ndarray[Any, Any]) -> pa.Array:
    return pa.array([row.tobytes() for row in values], pa.binary(values.shape[1]))


def chunks(documents: Documents, cuts: Sequence[int], *, bands: int, folder: Path) -> list[Path]:
    paths = []
    edges = [0, *sorted(cut % (len(documents) + 1) for cut in cuts), len(documents)]
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        part = documents[start:end]
        ids = np.array([list(doc_id) for doc_id, _ in part], dtype=np.uint8).reshape(-1, 16)
        hashes = np.array([row for _, row in part], dtype=np.uint64).reshape(-1, bands)
        paths.append(write(folder / f"chunk-{i}.arrow", ids, hashes, batches=1 + i % 3))
    return paths


def naive(documents: Documents, *, drop: bool) -> tuple[list[int], list[int], list[bytes]]:
    """Fate, first and key: every pair is compared."""
    n = len(documents)
    label = list(range(n))
    originals = {doc_id: i for i, (doc_id, _) in reversed(list(enumerate(documents)))}
    for i, j in itertools.combinations(range(n), 2):
        (one, hashes), (other, others) = documents[i], documents[j]
        are_kept = originals[one] == i and originals[other] == j
        if one == other or (are_kept and any(a == b for a, b in zip(hashes, others, strict=True))):
            low, high = sorted((label[i], label[j]))
            label = [low if each == high else each for each in label]
    fate = [
        DUPLICATE if originals[doc_id] != i else NEAR_DUPLICATE if drop and label[i] != i else KEPT
        for i, (doc_id, _) in enumerate(documents)
    ]
    key = [min(documents[j][0] for j in range(n) if label[j] == label[i]) for i in range(n)]
    return fate, label, key


def ids_of(seeds: list[int], *, hashed: bool) -> list[bytes]:
    """16 bytes for each seed: spread as document ids are, or alike but for a few bits at either end."""
    if hashed:
        return [xxhash.xxh3_128_digest(str(seed).encode()) for seed in seeds]
    return [bytes([seed % 3]) + bytes(14) + bytes([seed // 3]) for seed in seeds]


@st.composite
def corpora(draw: st.DrawFn) -> tuple[Documents, int]:
    bands = draw(st.integers(1, 4))
    n = draw(st.integers(0, 40))
    seeds = draw(st.lists(st.integers(0, draw(st.sampled_from([2, 20, 200]))), min_size=n, max_size=n))
    hashes = st.integers(0, draw(st.sampled_from([1, 8, 60])))
    rows = draw(st.lists(st.lists(hashes, min_size=bands, max_size=bands), min_size=n, max_size=n))
    spread = draw(st.booleans())
    bits = [[xxhash.xxh3_64_intdigest(str(h).encode()) if spread else h for h in row] for row in rows]
    return list(zip(ids_of(seeds, hashed=spread), bits, strict=True)), bands


@settings(max_examples=40, deadline=None)
@given(
    corpus=corpora(),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    partition_bytes=st.sampled_from([1, 64, 200, 1 << 20]),
    action=st.sampled_from(["drop", "group"]),
)
def test_clusters_are_those_of_comparing_every_pair_however_the_documents_are_cut_and_sorted(
    corpus: tuple[Documents, int], cuts: list[int], partition_bytes: int, action: Literal["drop", "group"]
) -> None:
    documents, bands = corpus
    with tempfile.TemporaryDirectory() as folder:
        paths = chunks(documents, cuts, bands=bands, folder=Path(folder))
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        near = NearDuplicates(bands=bands, action=action)
        decision = duplicates.decide(paths, near=near, scratch=scratch, partition_bytes=partition_bytes)
        outcome, first, key = naive(documents, drop=action == "drop")
        assert decision.outcome.tolist() == outcome
        assert decision.first.tolist() == first
        assert [bytes(row) for row in decision.key] == key
        if documents:
            assert {path.name for path in scratch.iterdir()} == {"outcome.u8", "first.i64", "key.u8"}


@pytest.mark.parametrize("partition_bytes", [100, 1 << 20])
def test_equal_ids_alone_are_duplicates_without_near_duplicates(tmp_path: Path, partition_bytes: int) -> None:
    seeds = [4, 1, 4, 2, 4, 1, 9]
    ids = np.frombuffer(b"".join(ids_of(seeds, hashed=True)), dtype=np.uint8).reshape(-1, 16)
    paths = [write(tmp_path / "a.arrow", ids[:3], None), write(tmp_path / "b.arrow", ids[3:], None)]
    decision = duplicates.decide(paths, near=None, scratch=tmp_path, partition_bytes=partition_bytes)
    assert decision.outcome.tolist() == [KEPT, KEPT, DUPLICATE, KEPT, DUPLICATE, DUPLICATE, KEPT]
    assert decision.first.tolist() == [0, 1, 0, 3, 0, 1, 6]
    assert (decision.key == ids).all()


def test_a_chain_of_documents_is_one_cluster(tmp_path: Path) -> None:
    n = 3000  # each meets only the next, in one band and the other by turns
    ids = np.frombuffer(b"".join(ids_of(list(range(n)), hashed=True)), dtype=np.uint8).reshape(-1, 16)
    order = np.random.default_rng(0).permutation(n).astype(np.uint64)
    bands = np.column_stack([order // 2, (order + 1) // 2]) + np.array([0, 1 << 40], dtype=np.uint64)
    path = write(tmp_path / "a.arrow", ids, bands)
    decision = duplicates.decide([path], near=NearDuplicates(bands=2), scratch=tmp_path, partition_bytes=5000)
    assert not decision.first.any()
    assert np.bincount(decision.outcome).tolist() == [1, 0, n - 1]
    assert {bytes(row) for row in decision.key} == {min(bytes(row) for row in ids)}


def test_memory_does_not_grow_with_the_documents_nor_with_those_of_one_key(tmp_path: Path) -> None:
    peaks = []
    for n in (40_000, 160_000):
        rng = np.random.default_rng(n)
        folder = tmp_path / str(n)
        folder.mkdir()
        paths = []
        for i in range(0, n, 10_000):
            ids = rng.integers(0, 256, (10_000, 16), dtype=np.uint8)
            bands = rng.integers(0, 1 << 63, (10_000, 2), dtype=np.uint64)
            ids[::3], bands[::2, 1] = 1, 1
            paths.append(write(folder / f"{i}.arrow", ids, bands))
        tracemalloc.start()
        decision = duplicates.decide(paths, near=NearDuplicates(bands=2), scratch=folder, partition_bytes=1 << 17)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (np.bincount(decision.outcome, minlength=3) > 0).all()
    assert peaks[1] < 1.3 * peaks[0]


def test_no_documents_give_no_decisions(tmp_path: Path) -> None:
    empty = write(tmp_path / "a.arrow", np.empty((0, 16)), np.empty((0, 14)))
    for paths in ([], [empty]):
        decision = duplicates.decide(paths, near=NearDuplicates(), scratch=tmp_path)
        assert decision.outcome.shape == decision.first.shape == (0,)
        assert decision.key.shape == (0, 16)


def test_a_chunk_of_other_settings_is_refused(tmp_path: Path) -> None:
    narrow = write(tmp_path / "a.arrow", np.zeros((2, 16)), np.zeros((2, 3)))
    with pytest.raises(CorpusError, match=r"a\.arrow: column bands is fixed_size_binary\[24\], expected .*\[112\]"):
        duplicates.decide([narrow], near=NearDuplicates(), scratch=tmp_path)
    without = write(tmp_path / "b.arrow", np.zeros((2, 16)), None)
    with pytest.raises(CorpusError, match=r"b\.arrow: column bands is missing"):
        duplicates.decide([without], near=NearDuplicates(), scratch=tmp_path)


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"x" * 5000])
def test_a_damaged_chunk_is_named(tmp_path: Path, damage: Any) -> None:
    path = write(tmp_path / "a.arrow", np.zeros((2, 16)), np.zeros((2, 14)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorpusError, match=r"a\.arrow: not a readable chunk"):
        duplicates.decide([path], near=NearDuplicates(), scratch=tmp_path)
