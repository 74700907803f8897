"""Best-fit packing: documents go whole into windows, so that only those longer than a window are cut.

Best-fit-decreasing of arXiv 2404.10830: the longest piece first, each into the fullest bin that still has room for
it. Pieces of one length are placed together, so the work is per (length, room) that occurs and not per document.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from tasks.corpus.files import replacing

Packing = Literal["concat", "best_fit"]

FORMAT = "moeforge-bins-1"


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Bin b holds the pieces offsets[b] to offsets[b+1]; pieces are token ranges of the concatenated documents.

    `offsets` int64 [bins + 1], `start` int64 [pieces], `length` int32 [pieces].
    """

    offsets: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack(lengths: NDArray[np.integer[Any]], *, seq_len: int) -> Bins:
    """Put documents of `lengths` tokens [n] into bins of `seq_len` tokens.

    A document longer than seq_len is cut into pieces of seq_len and a rest. Then best-fit-decreasing: of pieces
    equally long the first document's goes first; of bins with equally little room the one that got there first is
    taken. In a bin, pieces stand in the order in which they were placed.
    """
    start, length = _cut(lengths, seq_len=seq_len)
    order = np.argsort(seq_len - length, kind="stable")
    start, length = start[order], length[order]
    bin_of, count = _best_fit(np.bincount(length, minlength=seq_len + 1), seq_len=seq_len)
    order = np.argsort(bin_of, kind="stable")
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(bin_of, minlength=count), out=offsets[1:])
    return Bins(offsets=offsets, start=start[order], length=length[order])


def cached(path: Path, build: Callable[[], Bins], *, key: Mapping[str, str]) -> Bins:
    """The bins kept at `path` for this very `key`, mapped; built and kept if they aren't there, or are damaged."""
    bins = _read(path, key)
    if bins is None:
        _write(path, build(), key)
        bins = _read(path, key)
    if bins is None:
        raise ValueError(f"{path}: what was just written reads back otherwise; look at the disk and delete the file")
    return bins


def _cut(lengths: NDArray[np.integer[Any]], *, seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Start and length of each piece, document by document."""
    pieces = -(-lengths // seq_len)
    first = np.cumsum(pieces, dtype=np.int64) - pieces  # each document's first piece
    document_start = np.cumsum(lengths, dtype=np.int64) - lengths
    inside = (np.arange(int(pieces.sum()), dtype=np.int64) - np.repeat(first, pieces)) * seq_len
    length = np.minimum(np.repeat(lengths.astype(np.int64), pieces) - inside, seq_len).astype(np.int32)
    return np.repeat(document_start, pieces) + inside, length


def _best_fit(counts: NDArray[np.int64], *, seq_len: int) -> tuple[NDArray[np.int32], int]:
    """Bin of each piece, pieces in falling order of length, `counts`[l] of length l; and how many bins there are."""
    bin_of = np.empty(int(counts.sum()), dtype=np.int32)
    waiting: dict[int, deque[NDArray[np.int32]]] = defaultdict(deque)  # room left -> bins, first come first
    rooms = 0  # bit r is set while a bin with room r waits
    placed = bins = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            if fitting := rooms >> length:
                room = length + (fitting & -fitting).bit_length() - 1
                fits = room // length  # the bin gets that many in a row: after each it is still the fullest that fits
                taken = _take(waiting[room], -(-left // fits))
                if not waiting[room]:
                    rooms &= ~(1 << room)
            else:
                room, fits = seq_len, seq_len // length
                taken = np.arange(bins, bins - (-left // fits), dtype=np.int32)
                bins += len(taken)
            now = min(left, len(taken) * fits)
            bin_of[placed : placed + now] = np.repeat(taken, fits)[:now]
            full, over = divmod(now, fits)
            for some, rest in ((taken[:full], room - fits * length), (taken[full:], room - over * length)):
                if rest and len(some):
                    waiting[rest].append(some)
                    rooms |= 1 << rest
            placed, left = placed + now, left - now
    return bin_of, bins


def _take(queue: deque[NDArray[np.int32]], wanted: int) -> NDArray[np.int32]:
    """The first `wanted` bins of a queue, or all it has."""
    taken = []
    while queue and wanted:
        head = queue.popleft()
        if len(head) > wanted:
            queue.appendleft(head[wanted:])
            head = head[:wanted]
        taken.append(head)
        wanted -= len(head)
    return taken[0] if len(taken) == 1 else np.concatenate(taken)


def _write(path: Path, bins: Bins, key: Mapping[str, str]) -> None:
    pieces = pa.StructArray.from_arrays([pa.array(bins.start), pa.array(bins.length)], ["start", "length"])
    column = pa.LargeListArray.from_arrays(pa.array(bins.offsets), pieces)
    facts = {"format": FORMAT, "key": json.dumps(dict(key), sort_keys=True), "xxh3_64": _checksum(bins)}
    batch = pa.RecordBatch.from_arrays([column], names=["bins"]).replace_schema_metadata(facts)
    with replacing(path) as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)


def _read(path: Path, key: Mapping[str, str]) -> Bins | None:
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            facts = {k.decode(): v.decode() for k, v in (stream.schema.metadata or {}).items()}
            if facts.get("format") != FORMAT or facts.get("key") != json.dumps(dict(key), sort_keys=True):
                return None
            (batch,) = stream
    except (OSError, ValueError):  # not there, cut short, or no Arrow file: pa.ArrowInvalid is a ValueError
        return None
    column = batch.column("bins")
    start, length = (field.to_numpy(zero_copy_only=True) for field in column.values.flatten())
    bins = Bins(offsets=column.offsets.to_numpy(zero_copy_only=True), start=start, length=length)
    return bins if _checksum(bins) == facts["xxh3_64"] else None


def _checksum(bins: Bins) -> str:
    digest = xxhash.xxh3_64()
    for array in (bins.offsets, bins.start, bins.length):
        digest.update(array.data)
    return digest.hexdigest()
