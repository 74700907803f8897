"""A thread that makes items ahead of their use."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Draws from an endless `source` in a thread, at most `depth` items ahead of `get`.

    The thread ends with `close`, with an error of the source, or when this object is garbage collected; so `source`
    must not refer to the owner of this object.
    """

    def __init__(self, source: Iterator[T], *, depth: int) -> None:
        self._ready: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()
        self._free = threading.Semaphore(depth)
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_draw, args=(source, self._ready, self._free, stop), name="prefetch", daemon=True
        )
        self._thread.start()
        self._end = weakref.finalize(self, _end, stop, self._free)

    def get(self) -> T:
        """The next item; raises what the source raised in its place, and again from then on."""
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))
            raise error
        self._free.release()
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread and wait for it; its items are dropped."""
        self._end()
        self._thread.join()


def _draw(source: Iterator[T], ready: SimpleQueue[Any], free: threading.Semaphore, stop: threading.Event) -> None:
    try:
        while True:
            free.acquire()
            if stop.is_set():
                return
            ready.put((next(source), None))
    except BaseException as error:  # raised again where the item was wanted
        ready.put((None, error))


def _end(stop: threading.Event, free: threading.Semaphore) -> None:
    stop.set()
    free.release()
