from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.sampling import permutation


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_every_number_comes_exactly_once(n: int, seed: int) -> None:
    order = permutation.shuffled(n, round_keys=permutation.key(seed))
    assert sorted(order.tolist()) == list(range(n))


@settings(deadline=None)
@given(n=st.integers(2**40, 2**62), seed=st.integers(0, 100))
def test_places_in_a_huge_permutation_are_distinct_and_inside(n: int, seed: int) -> None:
    indices = np.array([0, 1, 2, n // 2, n - 2, n - 1], dtype=np.uint64)
    places = permutation.permute(indices, n, round_keys=permutation.key(seed, "huge"))
    assert len(set(places.tolist())) == len(indices)
    assert all(0 <= place < n for place in places.tolist())


def test_the_order_is_the_one_it_always_was() -> None:
    order = permutation.shuffled(10, round_keys=permutation.key(0, "code", 0))
    assert order.tolist() == [7, 6, 1, 0, 3, 4, 5, 8, 9, 2]


def test_a_plain_integer_network_gives_the_same_order() -> None:
    """The oracle: the same network in Python's own integers, one number at a time."""
    mask64 = (1 << 64) - 1

    def network(x: int, n: int, keys: list[int]) -> int:
        bits = max((n - 1).bit_length(), 2)
        high, low = bits // 2, bits - bits // 2
        left, right = x >> low, x & ((1 << low) - 1)
        for key in keys:
            mixed = right ^ key
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask64
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask64
            mixed ^= mixed >> 31
            left, right = right, (left ^ mixed) & ((1 << high) - 1)
            high, low = low, high
        x = (left << low) | right
        return x if x < n else network(x, n, keys)

    keys = permutation.key(5, "books", 2)
    for n in (1, 2, 3, 5, 64, 1000):
        expected = [network(i, n, keys.tolist()) for i in range(n)]
        assert permutation.shuffled(n, round_keys=keys).tolist() == expected


def test_other_keys_give_other_orders_that_look_random() -> None:
    n = 4096
    orders = [permutation.shuffled(n, round_keys=permutation.key(seed)) for seed in range(20)]
    fixed = [int((order == np.arange(n)).sum()) for order in orders]
    assert sum(fixed) < 60  # a random permutation has 1 fixed point on average
    lags = [abs(np.corrcoef(order[:-1], order[1:])[0, 1]) for order in orders]
    assert max(lags) < 0.08  # 5 standard deviations of 1/sqrt(n)
