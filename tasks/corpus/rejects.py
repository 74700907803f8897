"""Dropped records that are worth a look, as JSON lines: rule, file, row, and detail or text where there is one.

These are the first bad records of each rule of a task, every contaminated document, and the filtered ones whose text
was to be kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from tasks.corpus import spool

EXAMPLES = 100  # bad records of a rule shown per task


def lines(folder: Path, task: int, *, chunks: int, starts: list[int]) -> Iterator[bytes]:
    """The lines of a scanned task; `starts` is the row in its file at which each of its pieces begins."""
    seen: Counter[str] = Counter()
    for path in spool.chunk_paths(folder, task, chunks=chunks):
        for reject in spool.rejects(path).to_pylist():
            seen[reject["rule"]] += 1
            if _is_shown(reject, seen[reject["rule"]]):
                yield _line(reject, start=starts[reject["piece"]])


def _is_shown(reject: dict[str, Any], count: int) -> bool:
    if reject["bad"]:
        return count <= EXAMPLES
    return reject["rule"] == "contaminated" or reject["text"] is not None


def _line(reject: dict[str, Any], *, start: int) -> bytes:
    shown = {"rule": reject["rule"], "source": reject["source"], "row": start + reject["row"]}
    return orjson.dumps(shown | {name: reject[name] for name in ("detail", "text") if reject[name]}) + b"\n"
