"""Trace a batch to its documents: from slot to window, shard, document and source.

Any state of the sampler at or before the step is enough: the batches between are skipped without being drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.corpus import manifest, shards
from tasks.corpus.sampling import permutation
from tasks.corpus.sampling.packing import Packing
from tasks.corpus.sampling.sampler import Sampler
from tasks.corpus.sampling.windows import Origin, Windows


@dataclass(frozen=True, kw_only=True)
class TracedDocument:
    """The part of a document in a window: `origin` says which tokens, `at` where they begin in the window.

    `doc_id`, `source` and `row` are the document's columns in the shard; `row` is its row in the source.
    """

    at: int
    origin: Origin
    doc_id: str
    source: str
    row: int


@dataclass(frozen=True, kw_only=True)
class TracedSlot:
    """A slot of a global batch, whatever the rank that took it.

    `epoch` counts from 0: how often the domain had been served whole before. `ids` int64 [seq_len]; the first `tokens`
    of them are text, the rest is padding.
    """

    slot: int
    domain: str
    window: int
    epoch: int
    ids: NDArray[np.int64]
    tokens: int
    documents: list[TracedDocument]


def batch(
    corpus_dir: Path, state: Mapping[str, Any], *, step: int, seq_len: int, packing: Packing = "concat"
) -> list[TracedSlot]:
    """The global batch of optimizer step `step` (from 1), slot by slot.

    Args:
        state: `Sampler.state()` after step `step` - 1 or before, with the weights that held from there to `step`.

    Raises:
        ValueError: the corpus isn't the one that the state was taken on, the state is of a later step, or seq_len or
            packing are other ones.
    """
    corpus = manifest.load(corpus_dir)
    if corpus.sha256 != state["corpus_sha256"]:
        raise ValueError(
            f"{corpus_dir / manifest.FILE}: sha256 is {corpus.sha256} now and was {state['corpus_sha256']} when step "
            f"{step} was drawn, so its windows are others; bring that corpus back, for example with `git checkout` of "
            "the run's dvc.lock and `dvc checkout`"
        )
    if state["step"] >= step:
        raise ValueError(f"step = {step} lies before the sampler's state, which is of step {state['step']}")
    windows = {d: Windows(corpus_dir, d, "train", seq_len=seq_len, packing=packing) for d in state["domains"]}
    counts = {domain: len(some) for domain, some in windows.items()}
    sampler = Sampler.load(state, windows=counts, corpus_sha256=corpus.sha256, packing=packing)
    while sampler.step < step - 1:
        sampler.skip()
    documents = _Documents(corpus_dir)
    slots = []
    for slot, ((domain, window), epoch) in enumerate(zip(sampler.peek(), _epochs(sampler), strict=True)):
        row = windows[domain].window(window)
        slots.append(
            TracedSlot(
                slot=slot,
                domain=domain,
                window=window,
                epoch=epoch,
                ids=row.ids,
                tokens=row.tokens,
                documents=[
                    documents.traced(origin, at=at)
                    for at, origin in zip(row.starts.tolist(), windows[domain].origins(window), strict=True)
                ],
            )
        )
    return slots


def describe(
    slots: list[TracedSlot], *, decode: Callable[[list[int]], str] | None, characters: int | None
) -> list[dict[str, Any]]:
    """Slots as JSON values.

    Args:
        decode: ids to text; without it there is no text.
        characters: how much text of each document is shown; None shows all of it and the window's ids.
    """
    return [_slot(slot, decode=decode, characters=characters) for slot in slots]


def _slot(slot: TracedSlot, *, decode: Callable[[list[int]], str] | None, characters: int | None) -> dict[str, Any]:
    documents = []
    for document in slot.documents:
        origin = document.origin
        ids = slot.ids[document.at : document.at + origin.tokens].tolist()
        text = decode(ids if characters is None else ids[:characters]) if decode else None
        if text is not None and characters is not None and (len(text) > characters or len(ids) > characters):
            text = f"{text[:characters]}…"
        documents.append(
            {
                "shard": origin.shard,
                "document": origin.row,
                "doc_id": document.doc_id,
                "source": document.source,
                "row": document.row,
                "tokens": [origin.start, origin.start + origin.tokens],
                "at": document.at,
                "text": text,
            }
        )
    return {
        "slot": slot.slot,
        "domain": slot.domain,
        "window": slot.window,
        "epoch": slot.epoch,
        "tokens": slot.tokens,
        "documents": documents,
        **({"ids": slot.ids.tolist()} if characters is None else {}),
    }


class _Documents:
    """Provenance of documents, from shards that are mapped once each."""

    def __init__(self, corpus_dir: Path) -> None:
        self._corpus_dir = corpus_dir
        self._shards: dict[str, pa.RecordBatch] = {}

    def traced(self, origin: Origin, *, at: int) -> TracedDocument:
        if origin.shard not in self._shards:
            self._shards[origin.shard] = shards.open_shard(self._corpus_dir / origin.shard)
        doc_id, source, row = (
            self._shards[origin.shard].column(name)[origin.row].as_py() for name in ("doc_id", "source", "row")
        )
        return TracedDocument(at=at, origin=origin, doc_id=doc_id.hex(), source=source, row=row)


def _epochs(sampler: Sampler) -> list[int]:
    """Epoch of each slot of the sampler's next batch, before which a domain's windows are drawn in a row."""
    order = permutation.shuffled(
        sampler.batch, round_keys=permutation.key(sampler.seed, "slots", sampler.step)
    ).tolist()
    domains = [domain for domain, _ in sampler.peek()]
    first: dict[str, int] = {}
    for domain, place in zip(domains, order, strict=True):
        first[domain] = min(place, first.get(domain, place))
    served = dict(zip(sampler.domains, sampler.state()["cursor"], strict=True))
    return [
        (served[domain] + place - first[domain]) // sampler.windows[domain]
        for domain, place in zip(domains, order, strict=True)
    ]
