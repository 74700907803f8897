"""Fixed-length windows over the tokens of a split, straight from the mapped shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.corpus import manifest, shards

Split = Literal["train", "heldout"]


class Windows:
    """Whole, non-overlapping windows of `seq_len` tokens of a split's concatenated documents.

    `len()` counts them; `[i]` gives int64 [seq_len]. Windows run across documents and shards; what is left at the end
    of the split is not served.

    Raises:
        ValueError: an unknown domain, or a shard whose size isn't the manifest's.
        IndexError: a window that isn't there.
    """

    def __init__(self, corpus_dir: Path, domain: str, split: Split, *, seq_len: int) -> None:
        domains = manifest.load(corpus_dir).domains
        if domain not in domains:
            raise ValueError(f"{corpus_dir}: has no domain {domain!r}; it has {', '.join(domains)}")
        entry: manifest.SplitManifest = getattr(domains[domain], split)
        self.seq_len = seq_len
        self._where = f"{corpus_dir}: {domain}/{split}"
        self._parts = [_map(corpus_dir, shard) for shard in entry.shards]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self._count = entry.tokens // seq_len

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        if not 0 <= index < self._count:
            raise IndexError(f"{self._where} has {self._count} windows of {self.seq_len} tokens; there is no {index}")
        out = np.empty(self.seq_len, dtype=np.int64)
        start, filled = index * self.seq_len, 0
        part = int(np.searchsorted(self._ends, start, side="right"))
        offset = start - (int(self._ends[part - 1]) if part else 0)
        while filled < self.seq_len:
            piece = self._parts[part][offset : offset + self.seq_len - filled]
            out[filled : filled + len(piece)] = piece
            filled, part, offset = filled + len(piece), part + 1, 0
        return out


def heldout(corpus_dir: Path, *, seq_len: int, count: int) -> dict[str, NDArray[np.int64]]:
    """Held-out windows of every domain, int64 [<= count, seq_len], spread evenly over the split.

    Deterministic; fewer than `count` where the split is shorter.

    Raises:
        ValueError: a domain's held-out split has no whole window.
    """
    found = {}
    for domain in manifest.load(corpus_dir).domains:
        windows = Windows(corpus_dir, domain, "heldout", seq_len=seq_len)
        n = min(count, len(windows))
        if n == 0:
            raise ValueError(
                f"{corpus_dir}: the held-out part of {domain} is shorter than one window of {seq_len} tokens; "
                f"raise `heldout` of the domain, or lower seq_len"
            )
        found[domain] = np.stack([windows[i * len(windows) // n] for i in range(n)])
    return found


def _map(corpus_dir: Path, shard: manifest.Shard) -> NDArray[Any]:
    ids = shards.flat_ids(shards.open_shard(corpus_dir / shard.path))
    if len(ids) != shard.tokens:
        raise ValueError(
            f"{corpus_dir / shard.path}: has {len(ids)} tokens, its manifest {shard.tokens}; make the corpus again"
        )
    return ids
