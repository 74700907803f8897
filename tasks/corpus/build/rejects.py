"""Dropped records that are worth a look, as JSON lines: rule, file, row, and detail or text where there is one.

These are the first bad records of each rule of a task, every contaminated document, and the filtered ones whose text
was to be kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from tasks.corpus import files
from tasks.corpus.build import chunk_store

EXAMPLES = 100  # bad records of a rule shown per task


def lines(folder: Path, task: int, *, chunks: int, starts: list[int]) -> Iterator[bytes]:
    """The lines of a scanned task; `starts` is the row in its file at which each of its pieces begins."""
    seen: Counter[str] = Counter()
    for path in chunk_store.chunk_paths(folder, task, chunks=chunks):
        for reject in chunk_store.rejects(path).to_pylist():
            seen[reject["rule"]] += 1
            if _is_shown(reject, seen[reject["rule"]]):
                yield _line(reject, start=starts[reject["piece"]])


def too_bad(domain: str, *, found: str, rules: dict[str, str], max_bad: float, shown: Path) -> str:
    """The message of a domain that fails; `found` says how many records are bad, `rules` how many by which rule."""
    listed = "; ".join(f"{rule}: {text}" for rule, text in rules.items())
    return (
        f"domain {domain}: {found}, max_bad allows {max_bad:.2%}. {listed}. "
        f"Mend the file, correct `format` or `text_field`, or raise `max_bad`; {shown} has examples"
    )


def write(path: Path, content: Iterable[bytes]) -> Path:
    """Write the lines of a domain that fails, since nothing of it will be published."""
    with files.replacing(path) as file:
        file.writelines(content)
    return path


def _is_shown(reject: dict[str, Any], count: int) -> bool:
    if reject["bad"]:
        return count <= EXAMPLES
    return reject["rule"] == "contaminated" or reject["text"] is not None


def _line(reject: dict[str, Any], *, start: int) -> bytes:
    shown = {"rule": reject["rule"], "source": reject["source"], "row": start + reject["row"]}
    return orjson.dumps(shown | {name: reject[name] for name in ("detail", "text") if reject[name]}) + b"\n"
