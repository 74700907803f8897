"""The batches of a run: the corpus's sampler and loader for the settings, and the model's arguments for a batch.

With masked documents a window is several sequences. Stock attention takes that in two ways: position ids
that start again at each document, from which transformers builds the masks of eager, SDPA and flex attention
(`masking_utils.find_packed_sequence_indices`; only without an attention mask and a cache), and cumulative lengths,
with which flash attention takes its variable-length path at any B (`modeling_flash_attention_utils`; from position
ids it does so at B = 1 alone, and else attends across documents).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.sampling.loader import Batch, Loader, train_windows
from tasks.corpus.sampling.sampler import Sampler
from tasks.pretrain.job import Job

if TYPE_CHECKING:
    import torch


def draw(
    job: Job, weights: Mapping[str, float], *, corpus_sha256: str, rank: int, world_size: int
) -> tuple[Sampler, Loader]:
    """The run's sampler at its beginning, and the loader that draws one rank's windows by it; close the loader.

    Raises:
        ValueError: a domain with a weight has no whole window, or the batch is no multiple of world_size.
    """
    params = job.params
    sampler = Sampler(
        train_windows(job.corpus, list(weights), seq_len=params.seq_len, packing=params.packing),
        weights=weights,
        seed=params.seed,
        batch=params.batch,
        corpus_sha256=corpus_sha256,
        packing=params.packing,
    )
    loader = Loader(
        job.corpus,
        sampler,
        seq_len=params.seq_len,
        rank=rank,
        world_size=world_size,
        packing=params.packing,
        mask_documents=params.mask_documents,
    )
    return sampler, loader


def select(batch: Batch, rows: NDArray[np.int64]) -> Batch:
    """Some rows of a batch, in the order given; `step_targets` stays."""
    ids_BL = batch.input_ids[rows]
    positions = None if batch.position_ids is None else batch.position_ids[rows]
    if positions is None:
        starts = np.arange(len(rows)) * ids_BL.shape[1]
    else:
        starts = np.flatnonzero(positions.reshape(-1) == 0)
    return replace(
        batch,
        input_ids=ids_BL,
        labels=batch.labels[rows],
        position_ids=positions,
        cu_seqlens=np.append(starts, ids_BL.size).astype(np.int32),
        domains=[batch.domains[row] for row in rows],
        windows=[batch.windows[row] for row in rows],
    )


def plain(ids_BL: NDArray[np.int64], *, domain: str) -> Batch:
    """Windows of text as a batch: each one segment, of which all but the first token is predicted."""
    rows, length = ids_BL.shape
    return Batch(
        input_ids=ids_BL,
        labels=ids_BL,
        position_ids=None,
        cu_seqlens=(np.arange(rows + 1) * length).astype(np.int32),
        domains=[domain] * rows,
        windows=list(range(rows)),
        step_targets=rows * (length - 1),
    )


def documents(batch: Batch, rows: slice, device: torch.device) -> dict[str, Any]:
    """The model's arguments that keep documents apart; none where they aren't."""
    import torch

    if batch.position_ids is None:
        return {}
    length = batch.input_ids.shape[1]
    first, last = np.searchsorted(batch.cu_seqlens, [rows.start * length, rows.stop * length])
    ends = batch.cu_seqlens[first : last + 1] - rows.start * length
    lengths = torch.from_numpy(ends).to(device)
    longest = int(np.diff(ends).max())
    return {
        "position_ids": torch.from_numpy(batch.position_ids[rows]).to(device),
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": longest,
        "max_length_k": longest,
    }
