from __future__ import annotations

import copy
import functools
import gc
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.corpus import manifest
from tasks.corpus.sampling.loader import IGNORED, Batch, Loader, train_windows
from tasks.corpus.sampling.packing import Packing
from tasks.corpus.sampling.sampler import Sampler
from tasks.corpus.sampling.windows import Window, Windows
from tests.corpus.handmade import EOS, corpus, documents

SEQ_LEN, BATCH = 64, 12
WEIGHTS = {"prose": 0.7, "code": 0.3}
OTHERS = [{"prose": 0.2, "code": 0.8}, {"prose": 0.0, "code": 1.0}, WEIGHTS]
KINDS: list[tuple[Packing, bool]] = [("concat", False), ("concat", True), ("best_fit", False), ("best_fit", True)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    parts = [documents(rng.integers(1, 200, 40).tolist(), seed=seed) for seed in range(4)]
    return corpus(tmp_path_factory.mktemp("loader") / "two", {"prose": parts[:3], "code": parts[3:]})


@pytest.fixture(autouse=True)
def _beside_the_corpus(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.parent)  # packed windows are kept under the current folder


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    for thread in prefetchers():
        thread.join(timeout=10)
    assert prefetchers() == []


def prefetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def sampler(folder: Path, *, packing: Packing = "concat") -> Sampler:
    windows = train_windows(folder, list(WEIGHTS), seq_len=SEQ_LEN, packing=packing)
    sha256 = manifest.load(folder).sha256
    return Sampler(windows, weights=WEIGHTS, seed=0, batch=BATCH, corpus_sha256=sha256, packing=packing)


def loader(
    folder: Path, *, rank: int = 0, world_size: int = 1, packing: Packing = "concat", prefetch: int = 0, **knobs: Any
) -> Loader:
    place: dict[str, Any] = {"rank": rank, "world_size": world_size, "packing": packing, "prefetch": prefetch}
    return Loader(folder, sampler(folder, packing=packing), seq_len=SEQ_LEN, **place, **knobs)


def values(batch: Batch) -> dict[str, Any]:
    return {
        name: (value.dtype.name, value.tolist()) if isinstance(value, np.ndarray) else value
        for name, value in vars(batch).items()
    }


# What a batch holds


@functools.cache
def windows(folder: Path, domain: str, packing: Packing) -> Windows:
    return Windows(folder, domain, "train", seq_len=SEQ_LEN, packing=packing)


def drawn(one: Loader, slots: Sampler, *, folder: Path) -> tuple[Batch, list[Window]]:
    """The next batch, whose rows are the windows that the sampler drew, and these."""
    batch, expected = one.next(), slots.next()
    assert list(zip(batch.domains, batch.windows, strict=True)) == expected
    rows = [windows(folder, domain, slots.packing).window(index) for domain, index in expected]
    assert batch.input_ids.dtype == np.int64
    assert batch.input_ids.tolist() == [row.ids.tolist() for row in rows]
    return batch, rows


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_without_masks_only_padding_has_no_label_and_rows_are_the_segments(made: Path, packing: Packing) -> None:
    one, slots = loader(made, packing=packing), sampler(made, packing=packing)
    padded = 0
    for _ in range(20):
        batch, rows = drawn(one, slots, folder=made)
        assert batch.position_ids is None
        assert batch.cu_seqlens.tolist() == list(range(0, BATCH * SEQ_LEN + 1, SEQ_LEN))
        for row, labels in zip(rows, batch.labels, strict=True):
            padding = SEQ_LEN - row.tokens
            padded += padding
            assert row.ids[row.tokens :].tolist() == [EOS] * padding
            assert labels.tolist() == [*row.ids[: row.tokens], *[-100] * padding]
    assert bool(padded) == (packing == "best_fit")


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_masked_documents_are_what_transformers_makes_of_the_same_documents(made: Path, packing: Packing) -> None:
    from transformers import DataCollatorWithFlattening

    flatten = DataCollatorWithFlattening(return_position_ids=True, return_flash_attn_kwargs=True)
    one, slots = loader(made, packing=packing, mask_documents=True), sampler(made, packing=packing)
    padded = 0
    for _ in range(10):
        batch, rows = drawn(one, slots, folder=made)
        ends = ([row.tokens] if row.tokens < SEQ_LEN else [] for row in rows)  # the padding is a segment too
        pieces = [np.split(row.ids, [*row.starts[1:], *end]) for row, end in zip(rows, ends, strict=True)]
        flat = flatten([{"input_ids": piece.tolist()} for row in pieces for piece in row], return_tensors="np")
        labels = flat["labels"].reshape(BATCH, SEQ_LEN).copy()
        for row, own in zip(rows, labels, strict=True):
            own[row.tokens :] = -100
            padded += SEQ_LEN - row.tokens
        assert batch.position_ids is not None
        assert batch.position_ids.dtype == np.int64
        assert batch.position_ids.tolist() == flat["position_ids"].reshape(BATCH, SEQ_LEN).tolist()
        assert batch.cu_seqlens.dtype == np.int32
        assert batch.cu_seqlens.tolist() == np.asarray(flat["cu_seq_lens_q"]).tolist()
        assert batch.labels.dtype == np.int64
        assert batch.labels.tolist() == labels.tolist()
    assert bool(padded) == (packing == "best_fit")


# Who gets which rows


@pytest.mark.parametrize(("packing", "mask"), KINDS)
def test_the_ranks_together_get_the_global_batch_at_any_world_size_changed_at_each_step(
    made: Path, packing: Packing, mask: bool
) -> None:
    knobs: dict[str, Any] = {"packing": packing, "mask_documents": mask}
    alone = loader(made, **knobs)
    state = alone.sampler.state()
    for world_size in [1, 2, 3, 12, 2, 2, 1]:
        ranks = [loader(made, rank=rank, world_size=world_size, prefetch=1, **knobs) for rank in range(world_size)]
        for one in ranks:
            one.sampler.restore(json.loads(json.dumps(state)))
        expected, parts = alone.next(), [one.next() for one in ranks]
        predicted = (expected.labels[:, 1:] != IGNORED).sum()
        assert [batch.step_targets for batch in [expected, *parts]] == [predicted] * (1 + world_size)
        for rank, part in enumerate(parts):
            for field in ("input_ids", "labels", "domains", "windows", *(["position_ids"] if mask else [])):
                mine, whole = getattr(part, field), getattr(expected, field)
                assert np.array_equal(mine, whole[rank::world_size])
        states = [one.sampler.state() for one in ranks]
        state = states[-1]
        assert all(some == state for some in states)


def test_a_batch_that_ranks_cannot_share_is_refused(made: Path) -> None:
    with pytest.raises(ValueError, match="batch = 12 is not a multiple of world_size = 5"):
        loader(made, world_size=5)
    with pytest.raises(ValueError, match="rank = 2 is not one of 0 to 1"):
        loader(made, rank=2, world_size=2)
    with pytest.raises(ValueError, match="prefetch = -1 must be at least 0"):
        loader(made, prefetch=-1)


def test_a_sampler_of_other_windows_is_refused(made: Path) -> None:
    knobs: dict[str, Any] = {"rank": 0, "world_size": 1}
    with pytest.raises(ValueError, match="packing = 'concat' and the loader of 'best_fit'; give both the same"):
        Loader(made, sampler(made), seq_len=SEQ_LEN, packing="best_fit", **knobs)
    with pytest.raises(ValueError, match=r"the sampler is for windows = .* has .* of 32 tokens; make it with"):
        Loader(made, sampler(made), seq_len=32, **knobs)


# Batches made ahead

actions = st.sampled_from(["next", "next", "next", "save", "restore", "reopen", *range(len(OTHERS))])


@given(steps=st.lists(actions, min_size=3, max_size=40))
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_and_states_are_the_same_however_many_are_made_ahead(made: Path, steps: list[str | int]) -> None:
    knobs: dict[str, Any] = {"packing": "best_fit", "mask_documents": True}
    loaders = [loader(made, prefetch=depth, **knobs) for depth in (0, 1, 8)]
    saved = loaders[0].sampler.state()
    for action in steps:
        for i, one in enumerate(loaders):
            if isinstance(action, int):
                one.sampler.set_weights(OTHERS[action])
            elif action == "restore":
                one.sampler.restore(json.loads(json.dumps(saved)))
            elif action == "reopen":
                one.close()
                state = one.sampler.state()
                loaders[i] = loader(made, prefetch=one.prefetch, **knobs)
                loaders[i].sampler.restore(state)
        if action == "save":
            saved = loaders[-1].sampler.state()
        if action == "next":
            first, *others = [values(one.next()) for one in loaders]
            assert all(other == first for other in others)
        first_state, *states = [one.sampler.state() for one in loaders]
        assert all(state == first_state for state in states)
    for one in loaders:
        one.close()


def test_a_sampler_moved_past_a_batch_by_someone_else_is_followed(made: Path) -> None:
    with loader(made, prefetch=3) as one:
        expected = copy.deepcopy(one.sampler)
        one.next()
        one.sampler.next()
        expected.next(), expected.next()
        batch = one.next()
        assert list(zip(batch.domains, batch.windows, strict=True)) == expected.next()


def test_an_error_of_the_thread_comes_out_of_next_and_leaves_the_sampler_where_it_stood(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loader(made)
    with loader(made, prefetch=2) as one:
        for _ in range(3):
            assert values(one.next()) == values(expected.next())
        state = one.sampler.state()
        one.close()
        with monkeypatch.context() as broken:
            broken.setattr(Windows, "fill", lambda *_: 1 / 0)
            for _ in range(2):
                with pytest.raises(ZeroDivisionError):
                    one.next()
                assert one.sampler.state() == state
                assert prefetchers() == []
        for _ in range(3):
            assert values(one.next()) == values(expected.next())


def test_the_thread_ends_with_close_with_the_block_and_with_the_loader(made: Path) -> None:
    one = loader(made, prefetch=2)
    assert prefetchers() == []  # not before the first batch is wanted
    one.next()
    assert len(prefetchers()) == 1
    one.close()
    assert prefetchers() == []
    one.close()
    one.next()  # and begins again
    with one:
        pass
    assert prefetchers() == []
    one.next()
    (thread,) = prefetchers()
    del one
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()
