from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.pretrain.health import router_monitor
from tasks.pretrain.health.router_monitor import STEPS, TOKENS, Event, RouterMonitor


def even(tokens: int, *, experts: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Load of a router that draws top_k distinct experts for every token, int [experts]."""
    chosen = rng.random((tokens, experts)).argsort(1)[:, :top_k]
    return np.bincount(chosen.reshape(-1), minlength=experts)


def seen(looked: RouterMonitor, loads: Sequence[np.ndarray]) -> list[tuple[int, Event]]:
    return [(step, event) for step, load in enumerate(loads, 1) for event in looked.check(load, step=step)]


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 2, 32), (8, 1, 64), (144, 48, 128), (16, 4, 512)])
def test_an_even_router_raises_no_alarm(experts: int, top_k: int, tokens: int) -> None:
    rng = np.random.default_rng(0)
    loads = [np.stack([even(tokens, experts=experts, top_k=top_k, rng=rng) for _ in range(2)]) for _ in range(60)]
    assert seen(RouterMonitor(layers=[0, 1], experts=experts, top_k=top_k), loads) == []


def test_an_expert_forced_dead_is_named_once_with_its_layer_and_again_when_it_has_died_again() -> None:
    load = np.full((2, 8), 64)  # 256 tokens, 2 experts each
    forced = load.copy()
    forced[1, 5] = 0
    loads = [load] * 3 + [forced] * 30 + [load] + [forced] * 30
    result = seen(RouterMonitor(layers=[2, 7], experts=8, top_k=2), loads)
    assert [(step, e.what, e.layer, e.experts) for step, e in result] == [
        (3 + STEPS, "dead_experts", 7, (5,)),
        (34 + STEPS, "dead_experts", 7, (5,)),
    ]
    assert result[0][1].message.startswith(
        f"layer 7: expert 5 had no token in {STEPS} steps, up to {3 + STEPS}, in which"
    )
    assert "would have sent 560 to each" in result[0][1].message  # 10 x 448 assignments over 8 experts


def test_with_few_tokens_a_step_an_expert_is_dead_only_after_those_that_an_even_router_would_have_sent() -> None:
    load = np.array([[8, 8, 8, 0]])  # 12 tokens, 2 of 4 experts each: 6 to each if evenly
    result = seen(RouterMonitor(layers=[0], experts=4, top_k=2), [load] * 100)
    assert [step for step, _ in result] == [math.ceil(TOKENS / 6)]


def test_all_the_experts_of_a_layer_that_die_together_are_one_event() -> None:
    load = np.zeros((1, 40), dtype=np.int64)
    load[0, :27] = 1000
    [(step, event)] = seen(RouterMonitor(layers=[3], experts=40, top_k=10), [load] * 50)
    assert (step, event.experts) == (STEPS, tuple(range(27, 40)))
    assert "experts 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38 and 1 more" in event.message


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (144, 48)])
def test_a_collapsed_router_is_named_with_the_experts_that_hold_the_load(experts: int, top_k: int) -> None:
    held = np.arange(1, 1 + top_k)
    load = np.ones((2, experts), dtype=np.int64)  # nobody is dead
    load[0] = 100
    load[1, held] = 2000
    result = seen(RouterMonitor(layers=[0, 4], experts=experts, top_k=top_k), [load] * 40)
    assert [(step, e.what, e.layer, e.experts) for step, e in result] == [
        (STEPS, "router_collapse", 4, tuple(held.tolist()))
    ]
    assert f"the {top_k} busiest of {experts} experts" in result[0][1].message


def test_a_collapse_is_reported_after_steps_in_a_row_once_and_again_when_it_has_come_back() -> None:
    fine, bad = np.full((1, 4), 100), np.array([[370, 10, 10, 10]])
    one = RouterMonitor(layers=[0], experts=4, top_k=1)
    loads = [bad] * (STEPS - 1) + [fine] + [bad] * 30 + [fine] + [bad] * STEPS
    assert [step for step, _ in seen(one, loads)] == [2 * STEPS, 2 * STEPS + 21 + STEPS]


def test_one_expert_with_more_than_the_middle_between_its_even_share_and_all_is_a_collapse() -> None:
    over, under = (
        np.array([[626, 125, 125, 124]]),
        np.array([[624, 126, 125, 125]]),
    )  # the middle of 1/4 and 1 is 0.625
    assert router_monitor.evenness(over[0], top_k=1) > router_monitor.EVENNESS
    assert len(seen(RouterMonitor(layers=[0], experts=4, top_k=1), [over] * STEPS)) == 1
    assert seen(RouterMonitor(layers=[0], experts=4, top_k=1), [under] * STEPS) == []


def test_evenness_is_0_where_all_tokens_go_the_same_way_1_where_evenly_and_the_relative_entropy_for_one_expert() -> (
    None
):
    assert router_monitor.evenness(np.array([7, 7, 7, 7]), top_k=2) == pytest.approx(1)
    assert router_monitor.evenness(np.array([0, 9, 9, 0]), top_k=2) == pytest.approx(0)
    assert router_monitor.evenness(np.array([3, 1, 0, 0]), top_k=1) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    )


@pytest.mark.parametrize(("layers", "experts", "top_k"), [([], 0, 0), ([0], 4, 4)])
def test_dense_models_and_layers_that_use_every_expert_have_nothing_to_collapse(
    layers: list[int], experts: int, top_k: int
) -> None:
    looked = RouterMonitor(layers=layers, experts=experts, top_k=top_k)
    load = np.full((len(layers), experts), 100)
    assert seen(looked, [load] * 20) == []
    looked.restore(json.loads(json.dumps(looked.state())))
    assert seen(looked, [load] * 20) == []


def test_a_load_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4\); needed: \(1, 8\)"):
        RouterMonitor(layers=[0], experts=8, top_k=2).check(np.ones((1, 4), dtype=np.int64), step=1)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.sampled_from([0, 0, 1, 40, 400]), min_size=8, max_size=8), min_size=1, max_size=80),
    st.integers(0, 80),
)
def test_a_watch_restored_from_json_sees_what_the_one_that_was_never_interrupted_sees(
    rows: list[list[int]], cut: int
) -> None:
    loads = [np.array(row).reshape(2, 4) for row in rows for _ in range(3)]
    through = seen(RouterMonitor(layers=[0, 1], experts=4, top_k=1), loads)
    looked, result = RouterMonitor(layers=[0, 1], experts=4, top_k=1), []
    for step, load in enumerate(loads, 1):
        if step == cut:
            state = json.loads(json.dumps(looked.state()))
            looked = RouterMonitor(layers=[0, 1], experts=4, top_k=1)
            looked.restore(state)
        result += [(step, event) for event in looked.check(load, step=step)]
    assert result == through
