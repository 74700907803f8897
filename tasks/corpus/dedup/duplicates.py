"""Exact and near duplicates over a whole corpus, on disk: memory is bounded by `partition_bytes`, not by documents.

Equal `doc_id`s are exact duplicates. Of the rest, documents with an equal hash in any band are near-duplicates, and
clusters are the connected components. The scratch folder holds 25 bytes per document (outcome, first, key), 8 per
band, and 24 while one column is sorted. Columns are split by the leading bits of their hashes into files of about
`partition_bytes`, and each is sorted in memory; labels are joined by hooking and pointer jumping (Shiloach and
Vishkin 1982) on a mapped array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.corpus import files, shards
from tasks.corpus.records import CorpusError
from tasks.settings.corpus import NearDuplicates

KEPT, DUPLICATE, NEAR_DUPLICATE = range(3)

_ID_BYTES = 16
_Rows = NDArray[np.uint64]  # [rows, keys + 1], the ordinal last


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The outcome of each of n documents, in the order given; arrays mapped from the scratch folder.

    `outcome` uint8 [n]: KEPT, DUPLICATE or NEAR_DUPLICATE. `first` int64 [n]: the ordinal of the first document of its
    cluster, its own if alone. `key` uint8 [n, 16]: the smallest doc_id of the cluster.
    """

    outcome: NDArray[np.uint8]
    first: NDArray[np.int64]
    key: NDArray[np.uint8]


def decide(
    chunks: Sequence[Path],
    *,
    near: NearDuplicates | None,
    scratch: Path,
    band_files: Sequence[Path] | None = None,
    partition_bytes: int = 64 << 20,
) -> Decision:
    """Find the duplicates among the documents of `chunks`; of each cluster the first document stays.

    Args:
        chunks: Arrow IPC files with `doc_id`, fixed_size_binary(16). The first document of the first chunk has
            ordinal 0.
        band_files: of each chunk the file with its `bands`, fixed_size_binary(8 * bands): little-endian uint64s; the
            chunk itself if not given.
        near: also near-duplicates; with `action: group` they are clustered, and all kept.
        scratch: an existing folder; the result's arrays stay in it.
        partition_bytes: what is sorted in memory at once, which takes about five times as much.

    Raises:
        CorpusError: a chunk is damaged, or lacks a column.
    """
    bands = near.bands if near else 0
    n = _ingest(chunks, chunks if band_files is None else band_files, bands=bands, scratch=scratch)
    if not n:
        empty = np.empty(0, dtype=np.uint8)
        return Decision(outcome=empty, first=empty.astype(np.int64), key=empty.reshape(0, _ID_BYTES))
    outcome = np.memmap(scratch / "outcome.u8", dtype=np.uint8, mode="w+", shape=(n,))
    first = np.memmap(scratch / "first.i64", dtype=np.int64, mode="w+", shape=(n,))
    key = np.memmap(scratch / "key.u8", dtype=np.uint8, mode="r+", shape=(n, _ID_BYTES))
    sorter = _Sorter(scratch, partition_bytes)
    for ordinals, heads in sorter.groups(key.view("<u8"), outcome=outcome):
        first[ordinals] = heads
        outcome[ordinals[ordinals != heads]] = DUPLICATE
    for band in range(bands):
        path = _band(scratch, band)
        for ordinals, heads in sorter.groups(np.memmap(path, dtype="<u8", mode="r", shape=(n, 1)), outcome=outcome):
            others = ordinals != heads
            _join(first, ordinals[others], others=heads[others])
        path.unlink()
    if near:
        _settle(outcome, first, key=key, drop=near.action == "drop", step=sorter.rows(_ID_BYTES // 8))
    return Decision(outcome=outcome, first=first, key=key)


def _band(scratch: Path, band: int) -> Path:
    return scratch / f"band-{band:03d}.u64"


def _ingest(chunks: Sequence[Path], band_files: Sequence[Path], *, bands: int, scratch: Path) -> int:
    """Copy the chunks' columns into files of their own; returns the number of documents."""
    n = banded = 0
    with ExitStack() as stack:
        keys = stack.enter_context((scratch / "key.u8").open("wb"))
        columns = [stack.enter_context(_band(scratch, band).open("wb")) for band in range(bands)]
        for path, bands_path in zip(chunks, band_files, strict=True):
            for ids in _batches(path, "doc_id", width=_ID_BYTES):
                ids.tofile(keys)
                n += len(ids)
            for hashes in _batches(bands_path, "bands", width=8 * bands) if bands else ():
                banded += len(hashes)
                for band, column in enumerate(columns):
                    hashes.view("<u8")[:, band].tofile(column)
            if bands and banded != n:
                raise CorpusError(f"{bands_path}: has other rows than {path}; delete the work folder and run again")
    return n


def _batches(path: Path, name: str, *, width: int) -> Iterator[NDArray[np.uint8]]:
    """A column of a chunk's batches, uint8 [rows, width]; no other is read."""
    try:
        with pa.memory_map(str(path)) as file:
            schema = pa.ipc.open_file(file).schema
            if name not in schema.names or schema.field(name).type != pa.binary(width):
                kind = schema.field(name).type if name in schema.names else "missing"
                raise CorpusError(
                    f"{path}: column {name} is {kind}, expected fixed_size_binary[{width}]; it was written with "
                    "other settings: delete the work folder and run again"
                )
            wanted = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name)])
            reader = pa.ipc.open_file(file, options=wanted)
            for i in range(reader.num_record_batches):
                yield shards.from_binary(reader.get_batch(i).column(name))
    except (pa.ArrowInvalid, OSError, MemoryError) as error:
        files.raise_machine_error(error, path)
        raise CorpusError(f"{path}: not a readable chunk ({error}); delete it and run again") from error


class _Sorter:
    def __init__(self, scratch: Path, partition_bytes: int) -> None:
        self.scratch, self.partition_bytes = scratch, partition_bytes

    def rows(self, keys: int) -> int:
        """Documents to hold at once, each with its keys and its ordinal."""
        return max(self.partition_bytes // (8 * (keys + 1)), 2)

    def groups(
        self, keys: NDArray[np.uint64], *, outcome: NDArray[np.uint8]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Ordinals of kept documents, and for each the first with an equal key; blocks may repeat a first one."""
        step = self.rows(keys.shape[1])
        blocks = (_block(keys, outcome, start=start, step=step) for start in range(0, len(keys), step))
        bits = math.ceil(math.log2(max(len(keys) / step, 1)))
        if not bits:
            yield from _fold(blocks)
            return
        parts = [self.scratch / f"part-{part:05d}.u64" for part in range(1 << bits)]
        try:
            for block in blocks:
                _scatter(block, parts, bits=bits)
            for path in parts:
                if path.exists():
                    yield from _fold(_read(path, width=keys.shape[1] + 1, step=step))
        finally:
            for path in parts:
                path.unlink(missing_ok=True)


def _block(keys: NDArray[np.uint64], outcome: NDArray[np.uint8], *, start: int, step: int) -> _Rows:
    kept = np.flatnonzero(outcome[start : start + step] == KEPT)
    return np.column_stack([keys[start : start + step][kept], (kept + start).astype(np.uint64)])


def _scatter(block: _Rows, parts: Sequence[Path], *, bits: int) -> None:
    part = (block[:, 0] >> np.uint64(64 - bits)).astype(np.int64)
    block = block[np.argsort(part, kind="stable")]
    ends = np.cumsum(np.bincount(part, minlength=len(parts)))
    for path, start, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
        if start < end:
            with path.open("ab") as file:
                block[start:end].tofile(file)


def _read(path: Path, *, width: int, step: int) -> Iterator[_Rows]:
    with path.open("rb") as file:
        while len(block := np.fromfile(file, dtype=np.uint64, count=step * width)):
            yield block.reshape(-1, width)


def _fold(blocks: Iterable[_Rows]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Group rows that come in the order of their ordinals.

    Only the first row of each group goes on to the next block, so that one key with many rows, which no split by
    hash can part, takes no more memory than others.
    """
    seen: _Rows | None = None
    for block in blocks:
        rows = block if seen is None else np.concatenate([seen, block])
        rows = rows[np.lexsort(rows[:, :-1].T[::-1])]  # stable: the first of each key comes first
        is_head = np.ones(len(rows), dtype=bool)
        is_head[1:] = (rows[1:, :-1] != rows[:-1, :-1]).any(axis=1)
        seen = rows[is_head]
        heads = seen[np.cumsum(is_head) - 1, -1]
        yield rows[:, -1].astype(np.int64), heads.astype(np.int64)


def _roots(labels: NDArray[np.int64], nodes: NDArray[np.int64]) -> NDArray[np.int64]:
    while True:
        parents = labels[nodes]
        above = labels[parents]
        if (parents == above).all():
            return parents
        labels[nodes] = above


def _join(labels: NDArray[np.int64], nodes: NDArray[np.int64], *, others: NDArray[np.int64]) -> None:
    """Unite the trees of nodes[i] and others[i], all i; the root of a tree is its smallest node."""
    while len(nodes):
        nodes, others = _roots(labels, nodes), _roots(labels, others)
        apart = nodes != others
        low, high = np.minimum(nodes, others)[apart], np.maximum(nodes, others)[apart]
        np.minimum.at(labels, high, low)
        nodes, others = low, high


def _settle(
    outcome: NDArray[np.uint8], first: NDArray[np.int64], *, key: NDArray[np.uint8], drop: bool, step: int
) -> None:
    """Point every document at its root, and give every cluster its smallest key."""
    spans = [(start, min(start + step, len(outcome))) for start in range(0, len(outcome), step)]
    for start, end in spans:
        own = np.arange(start, end)
        roots = first[start:end] = _roots(first, own)
        members = own[(outcome[start:end] == KEPT) & (roots != own)]
        if drop:
            outcome[members] = NEAR_DUPLICATE
        _least(key, members, roots=first[members])
    for start, end in spans:
        key[start:end] = key[first[start:end]]


def _least(key: NDArray[np.uint8], members: NDArray[np.int64], *, roots: NDArray[np.int64]) -> None:
    """key[roots[i]] <- the smaller of it and key[members[i]], as bytes compare."""
    values: NDArray[Any] = key[members].view(">u8")
    order = np.lexsort((values[:, 1], values[:, 0], roots))
    roots, values = roots[order], values[order]
    is_head = np.ones(len(roots), dtype=bool)
    is_head[1:] = roots[1:] != roots[:-1]
    roots, values = roots[is_head], values[is_head]
    now: NDArray[Any] = key[roots].view(">u8")
    less = (values[:, 0] < now[:, 0]) | ((values[:, 0] == now[:, 0]) & (values[:, 1] < now[:, 1]))
    key[roots[less]] = np.ascontiguousarray(values[less]).view(np.uint8)
