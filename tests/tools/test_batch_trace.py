"""Traced batches against those that loaders gave, and their provenance against the shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.corpus import manifest, shards
from tasks.corpus.sampling.loader import Batch, Loader, train_windows
from tasks.corpus.sampling.packing import Packing
from tasks.corpus.sampling.sampler import Sampler
from tasks.tools import batch_trace
from tests.corpus.handmade import EOS, corpus, documents

SEQ_LEN, BATCH = 32, 8
WEIGHTS = {"prose": 0.7, "code": 0.3}
PACKINGS: tuple[Packing, ...] = ("concat", "best_fit")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of two and one shards, of few windows, so that epochs are short."""
    rng = np.random.default_rng(0)
    parts = [documents(rng.integers(1, 80, 12).tolist(), seed=seed) for seed in range(3)]
    return corpus(tmp_path_factory.mktemp("replay") / "two", {"prose": parts[:2], "code": parts[2:]})


@pytest.fixture(autouse=True)
def _beside_the_corpus(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.parent)  # packed windows are kept under the current folder


def loaders(folder: Path, packing: Packing) -> list[Loader]:
    """Two ranks, each with a sampler of its own."""
    windows = train_windows(folder, list(WEIGHTS), seq_len=SEQ_LEN, packing=packing)
    sha256 = manifest.load(folder).sha256
    return [
        Loader(
            folder,
            Sampler(windows, weights=WEIGHTS, seed=5, batch=BATCH, corpus_sha256=sha256, packing=packing),
            seq_len=SEQ_LEN,
            rank=rank,
            world_size=2,
            packing=packing,
            prefetch=0,
        )
        for rank in range(2)
    ]


def consume(folder: Path, packing: Packing, changes: dict[int, dict[str, float]], *, steps: int) -> Any:
    """The batches of both ranks of every step, and the sampler's state wherever the weights changed."""
    both = loaders(folder, packing)
    states = {0: both[0].sampler.state()}
    batches = []
    for step in range(steps):
        if step in changes:
            for loader in both:
                loader.sampler.set_weights(changes[step])
            states[step] = both[0].sampler.state()
        batches.append([loader.next() for loader in both])
    return batches, states


def check(result: list[batch_trace.TracedSlot], batches: list[Batch], served: Counter[tuple[str, int]]) -> None:
    """Ids, windows and epochs of a replayed batch against the two ranks' own."""
    assert [slot.slot for slot in result] == list(range(BATCH))
    for slot in result:
        rank, row = slot.slot % 2, slot.slot // 2
        batch = batches[rank]
        assert (slot.domain, slot.window) == (batch.domains[row], batch.windows[row])
        assert slot.ids.tolist() == batch.input_ids[row].tolist()
        assert slot.tokens == (batch.labels[row] >= 0).sum()
    for slot in result:  # a window may come twice in a batch, at an epoch's end
        again = [other.epoch for other in result if (other.domain, other.window) == (slot.domain, slot.window)]
        first = served[slot.domain, slot.window]
        assert sorted(again) == list(range(first, first + len(again)))
    served.update((slot.domain, slot.window) for slot in result)


weights = st.fixed_dictionaries({"prose": st.floats(0.0, 1.0), "code": st.floats(0.05, 1.0)})


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packing=st.sampled_from(PACKINGS), changes=st.dictionaries(st.integers(0, 19), weights, max_size=4))
def test_every_step_is_replayed_as_all_ranks_saw_it_from_the_state_at_the_last_change_of_weights(
    made: Path, packing: Packing, changes: dict[int, dict[str, float]]
) -> None:
    batches, states = consume(made, packing, changes, steps=20)
    served: Counter[tuple[str, int]] = Counter()
    for step, both in enumerate(batches, start=1):
        state = json.loads(json.dumps(states[max(change for change in states if change < step)]))
        check(batch_trace.batch(made, state, step=step, seq_len=SEQ_LEN, packing=packing), both, served)
    assert max(served.values()) > 1  # more than one epoch


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_token_is_traced_to_its_document_in_a_shard_and_its_row_in_the_source(
    made: Path, packing: Packing
) -> None:
    state = loaders(made, packing)[0].sampler.state()
    several = 0
    for slot in batch_trace.batch(made, state, step=3, seq_len=SEQ_LEN, packing=packing):
        at = 0
        for document in slot.documents:
            assert document.at == at
            origin = document.origin
            shard = shards.open_shard(made / origin.shard)
            assert origin.shard.startswith(f"{slot.domain}/train/")
            ids = shard.column("input_ids")[origin.row].as_py()
            part = ids[origin.start : origin.start + origin.tokens]
            assert part == slot.ids[at : at + origin.tokens].tolist()
            assert part
            assert document.doc_id == shard.column("doc_id")[origin.row].as_py().hex()
            assert (document.source, document.row) == ("made", origin.row)
            at += origin.tokens
        assert at == slot.tokens
        assert (slot.ids[at:] == EOS).all()
        several += len(slot.documents) > 1
    assert several


def test_a_description_shows_the_beginning_of_each_document_or_all_of_it(made: Path) -> None:
    slots = batch_trace.batch(made, loaders(made, "concat")[0].sampler.state(), step=1, seq_len=SEQ_LEN)

    def decode(ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)

    short, full = (batch_trace.describe(slots, decode=decode, characters=n) for n in (20, None))
    for slot, begun, whole in zip(slots, short, full, strict=True):
        assert json.dumps([begun, whole])
        assert "ids" not in begun
        assert whole["ids"] == slot.ids.tolist()
        for a, b in zip(begun["documents"], whole["documents"], strict=True):
            assert a["text"] == (b["text"] if len(b["text"]) <= 20 else f"{b['text'][:20]}…")
            assert b["text"] == decode(whole["ids"][b["at"] : b["at"] + b["tokens"][1] - b["tokens"][0]])
    textless = batch_trace.describe(slots, decode=None, characters=20)
    assert {document["text"] for slot in textless for document in slot["documents"]} == {None}


def test_another_corpus_an_earlier_step_or_another_length_is_refused(made: Path, tmp_path: Path) -> None:
    sampler = loaders(made, "concat")[0].sampler
    sampler.next()
    state = sampler.state()
    other = corpus(tmp_path / "two", {"prose": [documents([40, 50])], "code": [documents([60, 70])]})
    with pytest.raises(ValueError, match=r"manifest.json: sha256 is \w+ now and was \w+ when step 4 was drawn"):
        batch_trace.batch(other, state, step=4, seq_len=SEQ_LEN)
    with pytest.raises(ValueError, match="step = 1 lies before the sampler's state, which is of step 1"):
        batch_trace.batch(made, state, step=1, seq_len=SEQ_LEN)
    with pytest.raises(ValueError, match="windows is"):
        batch_trace.batch(made, state, step=4, seq_len=SEQ_LEN + 1)
    with pytest.raises(ValueError, match="packing is 'best_fit' now and was 'concat'"):
        batch_trace.batch(made, state, step=4, seq_len=SEQ_LEN, packing="best_fit")
