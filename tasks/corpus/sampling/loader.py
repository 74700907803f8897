"""Batches of token ids for one rank, made ahead of their use by a thread.

B = rows of the rank (batch / world_size), L = seq_len.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.sampling.packing import Packing
from tasks.corpus.sampling.prefetch import Prefetcher
from tasks.corpus.sampling.sampler import Position, Sampler, Slot
from tasks.corpus.sampling.windows import Windows

IGNORED = -100  # torch's cross_entropy and transformers leave such labels out


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a global batch.

    A segment attends only to itself: it is a row, or with `mask_documents` a document in it or the padding at its end.

    Attributes:
        input_ids: int64 [B, L].
        labels: int64 [B, L], `input_ids` with -100 at padding, where the shards' loss mask is False and, with
            `mask_documents`, at the first token of each segment, which only another document could predict. Not
            shifted: models do that.
        position_ids: int64 [B, L], from 0 in each segment; None without `mask_documents`.
        cu_seqlens: int32 [segments + 1], where segments start in the B * L tokens, and B * L.
        domains, windows: each row's origin.
        step_targets: predicted tokens of the whole global batch, all ranks' together.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64] | None
    cu_seqlens: NDArray[np.int32]
    domains: list[str]
    windows: list[int]
    step_targets: int


class Loader:
    """Rank r of W gets slots[r::W] of each global batch; all ranks run the same sampler.

    `sampler` stands at the last batch that `next` gave, however many are prefetched: its state is the one to save.
    Its weights or state may be set at any time; prefetched batches are then made again.

    Args:
        packing: how documents fill windows; the sampler's.
        mask_documents: no token sees, or is predicted from, another document than its own.
        prefetch: batches that a thread makes ahead; with 0 there is no thread.

    Raises:
        ValueError: the batch isn't a multiple of world_size, rank is outside it, or the sampler was made for other
            windows.
    """

    def __init__(
        self,
        corpus_dir: Path,
        sampler: Sampler,
        *,
        seq_len: int,
        rank: int,
        world_size: int,
        packing: Packing = "concat",
        mask_documents: bool = False,
        prefetch: int = 2,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank} is not one of 0 to {world_size - 1}")
        if sampler.batch % world_size:
            raise ValueError(f"batch = {sampler.batch} is not a multiple of world_size = {world_size}")
        if prefetch < 0:
            raise ValueError(f"prefetch = {prefetch} must be at least 0")
        if sampler.packing != packing:
            raise ValueError(
                f"the sampler is of packing = {sampler.packing!r} and the loader of {packing!r}; give both the same"
            )
        windows = {d: Windows(corpus_dir, d, "train", seq_len=seq_len, packing=packing) for d in sampler.domains}
        if sampler.windows != (counts := {domain: len(some) for domain, some in windows.items()}):
            raise ValueError(
                f"the sampler is for windows = {sampler.windows}, and {corpus_dir} has {counts} of {seq_len} tokens; "
                "make it with `train_windows` of this corpus and seq_len"
            )
        self.sampler, self.prefetch = sampler, prefetch
        mine = range(rank, sampler.batch, world_size)
        self._gather = Gather(windows, seq_len=seq_len, mine=mine, mask=mask_documents)
        self._ahead: Prefetcher[tuple[Position, Batch]] | None = None

    def next(self) -> Batch:
        """The rank's part of the next global batch. After an error the sampler stands where it stood."""
        batch = self._prefetched() if self.prefetch else self._gather(self.sampler.peek())
        self.sampler.skip()
        return batch

    def close(self) -> None:
        """End the thread. `next` may still be called, and starts another."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prefetched(self) -> Batch:
        """The prefetched batch if it was made for the position of the sampler; else all are made again."""
        try:
            if self._ahead is not None:
                position, batch = self._ahead.get()
                if position == self.sampler.position:
                    return batch
                self.close()
            self._ahead = Prefetcher(_batches(copy.deepcopy(self.sampler), self._gather), depth=self.prefetch)
            return self._ahead.get()[1]
        except BaseException:
            self.close()
            raise


def train_windows(
    corpus_dir: Path, domains: list[str], *, seq_len: int, packing: Packing = "concat"
) -> dict[str, int]:
    """Training windows of each domain: what `Sampler` takes as `windows`."""
    return {d: len(Windows(corpus_dir, d, "train", seq_len=seq_len, packing=packing)) for d in domains}


class Gather:
    """Makes the Batch of the slots `mine` of a global batch.

    Args:
        windows: of every domain that occurs.
        mask: no token sees, or is predicted from, another document than its own.
    """

    def __init__(self, windows: Mapping[str, Windows], *, seq_len: int, mine: range, mask: bool) -> None:
        self._windows, self._seq_len, self._mine, self._mask = windows, seq_len, mine, mask
        self._places = np.arange(len(mine) * seq_len) if mask else None

    def __call__(self, slots: list[Slot]) -> Batch:
        mine = [slots[i] for i in self._mine]
        # One block, since the C library gives three smaller ones back to the system and pays for every page again.
        ids_BL, labels_BL, position_BL = np.empty((3, len(mine), self._seq_len), dtype=np.int64)
        tokens = [self._windows[domain].fill(ids, window) for ids, (domain, window) in zip(ids_BL, mine, strict=True)]
        labels_BL[:] = ids_BL
        for labels, count in zip(labels_BL, tokens, strict=True):
            labels[count:] = IGNORED
        for labels, (domain, window) in zip(labels_BL, mine, strict=True):
            if (loss_mask := self._windows[domain].loss_mask(window)) is not None:
                labels[~loss_mask] = IGNORED
        segments = [self._segments(row, slot, tokens[row]) for row, slot in enumerate(mine)]
        cu_seqlens = np.concatenate([*segments, [ids_BL.size]], dtype=np.int32)
        if self._places is not None:
            labels_BL.reshape(-1)[cu_seqlens[:-1]] = IGNORED
            starts = np.repeat(cu_seqlens[:-1].astype(np.int64), np.diff(cu_seqlens))
            np.subtract(self._places, starts, out=position_BL.reshape(-1))
        return Batch(
            input_ids=ids_BL,
            labels=labels_BL,
            position_ids=position_BL if self._mask else None,
            cu_seqlens=cu_seqlens,
            domains=[domain for domain, _ in mine],
            windows=[window for _, window in mine],
            step_targets=sum(self._windows[domain].targets(window, mask=self._mask) for domain, window in slots),
        )

    def _segments(self, row: int, slot: Slot, tokens: int) -> NDArray[np.int32]:
        """Where segments start in the batch's row of which `tokens` are text."""
        first = row * self._seq_len
        if not self._mask:
            return np.array([first], dtype=np.int32)
        starts = self._windows[slot[0]].starts(slot[1]) + np.int32(first)
        return starts if tokens == self._seq_len else np.append(starts, np.int32(first + tokens))


def _batches(sampler: Sampler, gather: Gather) -> Iterator[tuple[Position, Batch]]:
    while True:
        yield sampler.position, gather(sampler.peek())
        sampler.skip()
