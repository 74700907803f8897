"""One live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

from tasks.corpus.build import Built, Report

EVERY = 10.0  # seconds between plain lines


class Progress:
    """Documents and tokens per domain while they are made; a context manager."""

    def __init__(self, domains: list[str]) -> None:
        self._live: Any = None
        self._tasks: dict[str, Any] = {}
        self._last = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Live
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (
                SpinnerColumn(finished_text="✓"),
                TextColumn("{task.description:16}"),
                TextColumn("{task.fields[documents]:>10,} documents {task.fields[tokens]:>14,} tokens"),
                TimeElapsedColumn(),
            )
            self._live = Live(*columns, console=Console(stderr=True))
            self._tasks = {
                name: self._live.add_task(name, total=1, start=False, documents=0, tokens=0) for name in domains
            }

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def reporter(self, domain: str) -> Report:
        """What a builder calls as it goes."""
        if self._live:
            self._live.start_task(self._tasks[domain])

        def report(documents: int, tokens: int) -> None:
            if self._live:
                self._live.update(self._tasks[domain], documents=documents, tokens=tokens)
            elif time.monotonic() - self._last > EVERY:
                self._last = time.monotonic()
                print(f"{domain}: {documents:,} documents, {tokens:,} tokens …", file=sys.stderr, flush=True)

        return report

    def done(self, domain: str, built: Built) -> None:
        """A domain is finished."""
        if self._live:
            self._live.update(self._tasks[domain], completed=1)
        counts = ", ".join(f"{n:,} {rule}" for rule, n in built.rules.items() if n)
        tokens = sum(shard["tokens"] for split in built.splits.values() for shard in split)
        line = f"{domain}: {tokens:,} tokens in {built.seconds:.1f} s; records: {counts}"
        for text in (line, *(f"{domain}: bad: {example}" for example in built.bad.values())):
            if self._live:
                self._live.console.print(text, highlight=False)
            else:
                print(text, file=sys.stderr, flush=True)
