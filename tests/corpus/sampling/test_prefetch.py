from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from tasks.corpus.sampling.prefetch import Prefetcher


@pytest.mark.parametrize("depth", [1, 3])
def test_items_come_in_order_and_never_more_than_depth_are_made_ahead(depth: int) -> None:
    asked, most_ahead = 0, 0
    made = threading.Semaphore(0)

    def count() -> Iterator[int]:
        nonlocal most_ahead
        for i in range(10**9):
            most_ahead = max(most_ahead, i + 1 - asked)
            made.release()
            yield i

    ahead = Prefetcher(count(), depth=depth)
    for _ in range(depth):  # made without being asked for
        assert made.acquire(timeout=30)
    for expected in range(500):
        asked += 1
        assert ahead.get() == expected
    ahead.close()
    assert most_ahead == depth


def test_an_error_comes_after_the_items_before_it_and_again_whenever_asked() -> None:
    def broken() -> Iterator[str]:
        yield "first"
        yield "second"
        raise OSError("the disk is gone")

    ahead = Prefetcher(broken(), depth=8)
    assert [ahead.get(), ahead.get()] == ["first", "second"]
    for _ in range(3):
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.get()
    ahead.close()


@pytest.mark.parametrize("used", [0, 5])
def test_the_thread_ends_when_nobody_holds_what_it_makes_things_for(used: int) -> None:
    before = set(threading.enumerate())
    ahead = Prefetcher(iter(int, 1), depth=2)
    (thread,) = set(threading.enumerate()) - before
    assert [ahead.get() for _ in range(used)] == [0] * used
    assert thread.is_alive()
    del ahead
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()
