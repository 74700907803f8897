"""The batches of a run: the corpus's sampler and loader, as the settings want them."""

from __future__ import annotations

from collections.abc import Mapping

from tasks.corpus.loader import Loader, train_windows
from tasks.corpus.sampler import Sampler
from tasks.pretrain.job import Job


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
