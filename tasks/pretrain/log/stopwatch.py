"""The seconds of a step and of its parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Starts when it is made; `with watch("forward"):` adds to that part, as often as it is entered."""

    def __init__(self, *parts: str) -> None:
        self.spent = dict.fromkeys(parts, 0.0)
        self._begun = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent[part] += time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self._begun
