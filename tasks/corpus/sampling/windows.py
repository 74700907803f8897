"""Fixed-length windows over the tokens of a split, straight from the mapped shards."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks import scratch
from tasks.corpus import manifest, shards
from tasks.corpus.manifest import Split
from tasks.corpus.sampling import packing
from tasks.corpus.sampling.packing import Packing


@dataclass(frozen=True, kw_only=True)
class Window:
    """A row of a batch.

    `ids` int64 [seq_len]; the first `tokens` of them are text, the rest is padding (EOS). `starts` int32 [n] says
    where documents, or what was cut off from them, start inside the window; the first is 0.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int32]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a stretch of a window comes from: `tokens` tokens from token `start` on of document `row` of a shard.

    `shard` is relative to the corpus, as in the manifest.
    """

    shard: str
    row: int
    start: int
    tokens: int


class Windows:
    """Whole, non-overlapping windows of `seq_len` tokens of a split.

    `len()` counts them; `[i]` gives int64 [seq_len], `window(i)` also where documents start.

    packing:
        concat: documents one after the other; windows run across documents and shards, and what is left at the end
        of the split is not served.
        best_fit: documents whole (`packing.pack`), every token served, windows padded with EOS. The bins are kept
        under `.scratch/packing/<manifest sha256>`.

    Raises:
        ValueError: an unknown domain, or a shard whose size isn't the manifest's.
        IndexError: a window that isn't there.
    """

    def __init__(
        self, corpus_dir: Path, domain: str, split: Split, *, seq_len: int, packing: Packing = "concat"
    ) -> None:
        corpus = manifest.load(corpus_dir)
        if domain not in corpus.domains:
            raise ValueError(f"{corpus_dir}: has no domain {domain!r}; it has {', '.join(corpus.domains)}")
        entry = corpus.domains[domain].splits[split]
        self.seq_len, self.packing = seq_len, packing
        self._where = f"{corpus_dir}: {domain}/{split}"
        self._pad = corpus.eos_token_id
        self._text = _Text(corpus_dir, entry)
        key = {"corpus": corpus.sha256, "domain": domain, "split": split, "seq_len": str(seq_len)}
        self._bins = _bins(self._text, key=key, seq_len=seq_len) if packing == "best_fit" else None
        self._count = entry.tokens // seq_len if self._bins is None else len(self._bins)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.window(index).ids

    def window(self, index: int) -> Window:
        """Window `index` with its document starts."""
        ids = np.empty(self.seq_len, dtype=np.int64)
        return Window(ids=ids, tokens=self.fill(ids, index), starts=self.starts(index))

    def fill(self, out: NDArray[np.int64], index: int) -> int:
        """Write window `index` to `out` int64 [seq_len]; returns how many of them are text."""
        self._check(index)
        if self._bins is None:
            self._text.copy(index * self.seq_len, out)
            return self.seq_len
        filled = 0
        for start, length in self._pieces(self._bins, index):
            self._text.copy(start, out[filled : filled + length])
            filled += length
        out[filled:] = self._pad
        return filled

    def loss_mask(self, index: int) -> NDArray[np.bool_] | None:
        """Which tokens of window `index` are targets, bool [seq_len]; None if the split has no loss mask."""
        self._check(index)
        if not self._text.has_mask:
            return None
        if self._bins is None:
            return self._text.loss_mask(index * self.seq_len, (index + 1) * self.seq_len)
        parts = [self._text.loss_mask(start, start + length) for start, length in self._pieces(self._bins, index)]
        text = np.concatenate(parts)
        return np.pad(text, (0, self.seq_len - len(text)))  # padding is no target

    def starts(self, index: int) -> NDArray[np.int32]:
        """Where documents start in window `index`, as in `Window`."""
        self._check(index)
        if self._bins is None:
            return self._text.starts(index * self.seq_len, (index + 1) * self.seq_len)
        lengths = self._bins.length[slice(*self._bins.offsets[index : index + 2])]
        return lengths.cumsum(dtype=np.int32) - lengths

    def targets(self, index: int, *, mask: bool) -> int:
        """Tokens of window `index` that are targets: its text but the first token, with `mask` each document's.

        Where the split has a loss mask, only the tokens that it names.
        """
        self._check(index)
        if (targets := self.loss_mask(index)) is not None:
            targets[self.starts(index) if mask else 0] = False
            return int(targets.sum())
        tokens = self.seq_len
        if self._bins is not None:
            tokens = int(self._bins.length[slice(*self._bins.offsets[index : index + 2])].sum())
        return tokens - (len(self.starts(index)) if mask else 1)

    def origins(self, index: int) -> list[Origin]:
        """The documents of window `index`, one for each of its `starts`."""
        self._check(index)
        if self._bins is None:
            return self._text.origins(index * self.seq_len, (index + 1) * self.seq_len)
        pieces = self._pieces(self._bins, index)
        return [origin for start, length in pieces for origin in self._text.origins(start, start + length)]

    @staticmethod
    def _pieces(bins: packing.Bins, index: int) -> Iterator[tuple[int, int]]:
        pieces = slice(*bins.offsets[index : index + 2])
        return zip(bins.start[pieces].tolist(), bins.length[pieces].tolist(), strict=True)

    def _check(self, index: int) -> None:
        if not 0 <= index < self._count:
            raise IndexError(f"{self._where} has {self._count} windows of {self.seq_len} tokens; there is no {index}")


def validation(corpus_dir: Path, *, seq_len: int, count: int) -> dict[str, NDArray[np.int64]]:
    """Windows of each trained domain to decide by, int64 [<= count, seq_len], spread evenly over the validation split.

    Deterministic; fewer than `count` where the split is shorter.

    Raises:
        ValueError: a domain's split has no whole window.
    """
    return _spread(corpus_dir, "validation", seq_len=seq_len, count=count)


def test(corpus_dir: Path, *, seq_len: int, count: int) -> dict[str, NDArray[np.int64]]:
    """Windows of each trained domain to report, as `validation` gives them. For evaluations alone.

    A figure by which anything was chosen says no longer how the result does on text it has not seen.
    """
    return _spread(corpus_dir, "test", seq_len=seq_len, count=count)


def unseen(corpus_dir: Path, *, seq_len: int, count: int) -> dict[str, NDArray[np.int64]]:
    """The same of the domains of which nothing was trained on; {} without such domains."""
    return _spread(corpus_dir, "test", seq_len=seq_len, count=count, unseen=True)


def require(corpus_dir: Path, split: Split, *, seq_len: int) -> None:
    """Raise ValueError naming the domains whose split has no whole window of `seq_len` tokens.

    Unseen domains have a test split alone.
    """
    corpus = manifest.load(corpus_dir)
    domains = corpus.domains if split == "test" else corpus.trained
    short = [domain for domain, entry in domains.items() if entry.splits[split].tokens < seq_len]
    if short:
        raise ValueError(
            f"{corpus_dir}: the {split} part of {', '.join(short)} is shorter than one window of {seq_len} tokens; "
            f"raise `heldout` of the domain, give it more text, or lower seq_len"
        )


def _spread(
    corpus_dir: Path, split: Split, *, seq_len: int, count: int, unseen: bool = False
) -> dict[str, NDArray[np.int64]]:
    require(corpus_dir, split, seq_len=seq_len)
    corpus = manifest.load(corpus_dir)
    chosen = {}
    for domain in corpus.unseen if unseen else corpus.trained:
        windows = Windows(corpus_dir, domain, split, seq_len=seq_len)
        n = min(count, len(windows))
        chosen[domain] = np.stack([windows[i * len(windows) // n] for i in range(n)])
    return chosen


class _Text:
    """The documents of a split one after the other: token positions count on across shards."""

    def __init__(self, corpus_dir: Path, entry: manifest.SplitManifest) -> None:
        self._paths = [shard.path for shard in entry.shards]
        self._ids, self._offsets, self._masks = [], [], []
        for shard in entry.shards:
            batch = shards.open_shard(corpus_dir / shard.path)
            self._ids.append(shards.flat_ids(batch))
            self._offsets.append(shards.offsets(batch))
            self._masks.append(shards.loss_mask(batch))
            if len(self._ids[-1]) != shard.tokens:
                raise ValueError(
                    f"{corpus_dir / shard.path}: has {len(self._ids[-1])} tokens, its manifest {shard.tokens}; "
                    "make the corpus again"
                )
        self._ends = list(accumulate(len(ids) for ids in self._ids))
        self.has_mask = any(mask is not None for mask in self._masks)

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, int32 [documents]."""
        return np.concatenate([np.diff(offsets).astype(np.int32) for offsets in self._offsets])

    def copy(self, begin: int, out: NDArray[np.int64]) -> None:
        """Write the tokens from position `begin` on to `out` int64 [n]."""
        shard = bisect_right(self._ends, begin)
        while len(out):
            ids = self._ids[shard]
            start = begin - self._ends[shard] + len(ids)
            piece = ids[start : start + len(out)]
            out[: len(piece)] = piece
            begin, out, shard = begin + len(piece), out[len(piece) :], shard + 1

    def loss_mask(self, begin: int, end: int) -> NDArray[np.bool_]:
        """Which tokens in [begin, end) are targets, bool [end - begin]."""
        out, filled = np.ones(end - begin, dtype=bool), 0
        for shard, a, b in self._ranges(begin, end):
            if (mask := self._masks[shard]) is not None:
                out[filled : filled + b - a] = mask.slice(a, b - a).to_numpy(zero_copy_only=False)
            filled += b - a
        return out

    def starts(self, begin: int, end: int) -> NDArray[np.int32]:
        """Where documents start in [begin, end), counted from `begin`; 0 is always among them."""
        parts: list[NDArray[Any]] = []
        filled = 0
        for shard, a, b in self._ranges(begin, end):
            offsets = self._offsets[shard]
            low, high = np.searchsorted(offsets, (a, b))
            parts.append(offsets[low:high] + (filled - a))
            filled += b - a
        starts = np.concatenate(parts).astype(np.int32)
        return starts if len(starts) and not starts[0] else np.concatenate([np.zeros(1, dtype=np.int32), starts])

    def origins(self, begin: int, end: int) -> list[Origin]:
        """The documents of the positions [begin, end)."""
        origins = []
        for shard, a, b in self._ranges(begin, end):
            offsets = self._offsets[shard]
            first, last = int(np.searchsorted(offsets, a, side="right")) - 1, int(np.searchsorted(offsets, b))
            for row in range(first, last):
                low, high = int(offsets[row]), int(offsets[row + 1])
                tokens = min(high, b) - max(low, a)
                origins.append(Origin(shard=self._paths[shard], row=row, start=max(a - low, 0), tokens=tokens))
        return origins

    def _ranges(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(shard, from, to) of the pieces of shards that make up the positions from begin to end."""
        shard = bisect_right(self._ends, begin)
        while begin < end:
            before = self._ends[shard] - len(self._ids[shard])
            stop = min(end, self._ends[shard])
            yield shard, begin - before, stop - before
            begin, shard = stop, shard + 1


def _bins(text: _Text, *, key: dict[str, str], seq_len: int) -> packing.Bins:
    path = scratch.ROOT / "packing" / key["corpus"] / f"{key['domain']}-{key['split']}-{seq_len}.arrow"
    return packing.cached(path, lambda: packing.pack(text.lengths(), seq_len=seq_len), key=key)
