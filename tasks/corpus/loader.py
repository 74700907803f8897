"""Batches of token ids for one rank. The gather is a copy out of mapped files, so nothing is prefetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.sampler import Sampler
from tasks.corpus.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a global batch: `input_ids` int64 [batch / world_size, seq_len] and each row's origin."""

    input_ids: NDArray[np.int64]
    domains: list[str]
    windows: list[int]


class Loader:
    """Rank r of W gets slots[r::W] of each global batch; all ranks run the same sampler.

    The state to save is the sampler's, taken after the last batch that was used.

    Raises:
        ValueError: the batch isn't a multiple of world_size, or rank is outside it.
    """

    def __init__(self, corpus_dir: Path, sampler: Sampler, *, seq_len: int, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank} is not one of 0 to {world_size - 1}")
        if sampler.batch % world_size:
            raise ValueError(f"batch = {sampler.batch} is not a multiple of world_size = {world_size}")
        self.sampler = sampler
        self._rank, self._world_size = rank, world_size
        self._windows = {d: Windows(corpus_dir, d, "train", seq_len=seq_len) for d in sampler.domains}

    def next(self) -> Batch:
        """The rank's part of the next global batch."""
        slots = self.sampler.next()[self._rank :: self._world_size]
        return Batch(
            input_ids=np.stack([self._windows[domain][window] for domain, window in slots]),
            domains=[domain for domain, _ in slots],
            windows=[window for _, window in slots],
        )


def train_windows(corpus_dir: Path, domains: list[str], *, seq_len: int) -> dict[str, int]:
    """Training windows of each domain: what `Sampler` takes as `windows`."""
    return {domain: len(Windows(corpus_dir, domain, "train", seq_len=seq_len)) for domain in domains}
