from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.corpus.sampling import permutation
from tasks.corpus.sampling.sampler import BLOCK, Sampler
from tasks.corpus.sampling.weights import quantise

WINDOWS = {"code": 17, "books": 5, "legal": 40, "web": 1000}
WEIGHTS = {"code": 0.3, "books": 0.1, "legal": 0.05, "web": 0.55}
OTHER = {"code": 0.1, "books": 0.6, "legal": 0.25, "web": 0.05}


def sampler(**changes: Any) -> Sampler:
    return Sampler(
        **{"windows": WINDOWS, "weights": WEIGHTS, "seed": 1, "batch": 24, "corpus_sha256": "c0ffee", **changes}
    )


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


def continued(one: Sampler) -> Sampler:
    return Sampler.load(through_json(one.state()), windows=WINDOWS, corpus_sha256="c0ffee")


def test_the_union_over_ranks_is_the_same_however_world_size_and_weights_change_at_any_step() -> None:
    expected = sampler()
    resumed = sampler()
    for step in range(40):
        if step in {7, 8, 23}:
            for one in (expected, resumed):
                one.set_weights(OTHER if step != 23 else WEIGHTS)
        world_size = [1, 2, 3, 4, 6, 8, 12, 24][step % 8]
        resumed = continued(resumed)  # and once more for each rank: a second resume must not start over
        ranks = [continued(resumed) for _ in range(world_size)]
        parts = [one.next()[rank::world_size] for rank, one in enumerate(ranks)]
        assert [slot for group in zip(*parts, strict=True) for slot in group] == expected.next()
        resumed = ranks[-1]


@given(
    raw=st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any),
    batch=st.integers(1, 40),
)
@settings(deadline=None, max_examples=15)
@example(raw=[1, 30, 200, 1, 5, 3], batch=3)  # serving the largest claims first comes a slot late here
def test_served_slots_stay_within_one_of_the_exact_share_at_every_step(raw: list[int], batch: int) -> None:
    names = [f"d{i}" for i in range(len(raw))]
    one = Sampler(
        dict.fromkeys(names, 7),
        weights=dict(zip(names, map(float, raw), strict=True)),
        seed=0,
        batch=batch,
        corpus_sha256="",
    )
    shares = [Fraction(w, 2**32) for w in quantise(map(float, raw))]
    served: Counter[str] = Counter()
    for step in range(1, 250 if batch == 3 else 50):
        slots = one.next()
        assert len(slots) == batch
        served.update(domain for domain, _ in slots)
        for name, share in zip(names, shares, strict=True):
            assert abs(served[name] - share * batch * step) < 1
            assert share or not served[name]


@given(
    steps=st.lists(st.dictionaries(st.sampled_from(sorted(WINDOWS)), st.floats(0.01, 1), min_size=1), max_size=30),
    batch=st.integers(1, 30),
)
@settings(deadline=None, max_examples=20)
def test_batches_stay_full_while_weights_change_at_every_step(steps: list[dict[str, float]], batch: int) -> None:
    one = sampler(batch=batch)
    for weights in steps:
        one.set_weights({domain: weights.get(domain, 0.0) for domain in WINDOWS})
        slots = one.next()
        assert len(slots) == batch
        assert {domain for domain, _ in slots} <= set(weights)
        state = one.state()
        assert sum(state["residual"]) == 0
        assert all(residual > -(2**32) for residual in state["residual"])


mixes = st.lists(st.sampled_from([WEIGHTS, OTHER, {**OTHER, "web": 0.0}]), max_size=40)


@given(steps=mixes, batch=st.integers(1, 60))
@settings(deadline=None, max_examples=20)
def test_each_window_of_each_domain_is_served_as_often_as_any_other_or_once_more_while_weights_change(
    steps: list[dict[str, float]], batch: int
) -> None:
    one = sampler(batch=batch)
    served: Counter[tuple[str, int]] = Counter()
    for weights in steps:
        one.set_weights(weights)
        served.update(one.next())
    cursors = dict(zip(WINDOWS, one.state()["cursor"], strict=True))
    assert sum(cursors.values()) == batch * len(steps)
    for domain, n in WINDOWS.items():
        whole, over = divmod(cursors[domain], n)
        times = sorted(served[domain, window] for window in range(n))
        assert times == [whole] * (n - over) + [whole + 1] * over


@given(steps=mixes, batch=st.integers(1, 60), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_looking_at_a_batch_moves_nothing_and_skipping_it_moves_as_drawing_it_does(
    steps: list[dict[str, float]], batch: int, seed: int
) -> None:
    drawn, skipped, looked = (sampler(batch=batch, seed=seed) for _ in range(3))
    for weights in steps:
        for one in (drawn, skipped, looked):
            one.set_weights(weights)
        before = looked.position
        slots = looked.peek()
        assert looked.position == before
        looked.skip()
        skipped.skip()
        assert slots == drawn.next()
        assert drawn.position == skipped.position == looked.position
        assert drawn.state() == skipped.state() == looked.state()


@pytest.mark.parametrize("n", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("batch", [1, 700, 5000])
def test_windows_come_in_the_order_of_the_permutation_across_blocks_and_epochs(n: int, batch: int) -> None:
    one = Sampler({"only": n}, weights={"only": 1.0}, seed=3, batch=batch, corpus_sha256="")
    epochs = range((n + 3 * batch) // n + 1)
    orders = [permutation.shuffled(n, round_keys=permutation.key(3, "only", epoch)).tolist() for epoch in epochs]
    begin = n - 5  # in the first epoch
    one.restore(one.state() | {"cursor": [begin]})
    result = []
    for step in range(3):
        places = permutation.shuffled(batch, round_keys=permutation.key(3, "slots", step)).tolist()
        result += [window for _, (_, window) in sorted(zip(places, one.next(), strict=True))]
    assert result == [window for order in orders for window in order][begin : begin + 3 * batch]


def test_the_state_is_small_json_and_the_first_batch_after_step_ten_million_costs_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    domains = ["commoncrawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange"]
    weights = dict(zip(domains, [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.015625], strict=True))
    windows = dict.fromkeys(domains, 3_000_000)
    one = Sampler(windows, weights=weights, seed=2**31, batch=64, corpus_sha256="f" * 64)
    state = one.state()
    state |= {"step": 10**7, "cursor": [int(10**7 * 64 * w) for w in weights.values()]}
    assert len(json.dumps(state)) < 1024

    work = []
    permute = permutation.permute
    monkeypatch.setattr(
        permutation, "permute", lambda indices, n, **keys: work.append(len(indices)) or permute(indices, n, **keys)
    )
    one.next()
    at_start, work[:] = sum(work), []
    one.restore(through_json(state))
    one.next()
    assert sum(work) == at_start == 64 + 7 * BLOCK  # slots, and the surroundings of each domain's next window


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus_sha256": "bad"}, "corpus_sha256 is 'bad' now and was 'c0ffee'.*the corpus changed"),
        ({"packing": "best_fit"}, "packing is 'best_fit' now and was 'concat'.*set it back"),
        ({"seed": 2}, "seed is 2 now and was 1"),
        ({"batch": 12}, "batch is 12 now and was 24"),
        ({"windows": {**WINDOWS, "web": 999}}, "windows.*seq_len changed"),
        ({"windows": dict(reversed(WINDOWS.items()))}, "domains"),
    ],
)
def test_a_state_of_another_run_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    saved = sampler()
    saved.next()
    other = sampler(**change)
    before = other.state()
    with pytest.raises(ValueError, match=message):
        other.restore(saved.state())
    assert other.state() == before


def test_a_state_from_before_there_was_packing_is_one_of_concatenated_windows() -> None:
    saved = sampler()
    saved.next()
    old = {field: value for field, value in saved.state().items() if field != "packing"}
    one = sampler()
    one.restore(old)
    assert one.state() == saved.state()
    with pytest.raises(ValueError, match="packing is 'best_fit' now and was 'concat'"):
        sampler(packing="best_fit").restore(old)


def test_a_domain_without_a_window_needs_weight_zero() -> None:
    with pytest.raises(ValueError, match=r"domain books has weight 0.1 but not one whole training window"):
        sampler(windows={**WINDOWS, "books": 0})
    none = sampler(windows={**WINDOWS, "books": 0}, weights={**WEIGHTS, "books": 0.0})
    assert all(domain != "books" for _ in range(20) for domain, _ in none.next())


def test_weights_for_other_domains_are_refused() -> None:
    with pytest.raises(ValueError, match="weights are for code; the sampler has code, books, legal, web"):
        sampler(weights={"code": 1.0})
