"""Dropped records that are worth a look, as JSON lines: rule, file, row, and detail or text where there is one.

These are the first bad records of each rule of a task, every contaminated document, and filtered documents if the
corpus keeps their text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson

from tasks.corpus import files
from tasks.corpus.build import chunk_store

EXAMPLES = 100  # bad records of a rule shown per task


def lines(folder: Path, task: int, *, starts: list[int]) -> Iterator[bytes]:
    """The lines of a task; `starts` is the row in its file at which each of its pieces begins."""
    seen: Counter[str] = Counter()
    for path in chunk_store.chunk_paths(folder, task):
        for reject in chunk_store.rejects(path).to_pylist():
            rule = reject["rule"]
            seen[rule] += 1
            if seen[rule] <= EXAMPLES if reject["bad"] else rule == "contaminated" or reject["text"] is not None:
                line = {"rule": rule, "source": reject["source"], "row": starts[reject["piece"]] + reject["row"]}
                yield orjson.dumps(line | {name: reject[name] for name in ("detail", "text") if reject[name]}) + b"\n"


def message(domain: str, *, counts: str, rules: dict[str, str], max_bad: float, examples: Path) -> str:
    """The message of a domain that fails: how many records are bad, and how many by which rule."""
    by_rule = "; ".join(f"{rule}: {text}" for rule, text in rules.items())
    return (
        f"domain {domain}: {counts}, max_bad allows {max_bad:.2%}. {by_rule}. "
        f"Correct the file, `format` or `text_field`, or raise `max_bad`; {examples} has examples"
    )


def write(path: Path, content: Iterable[bytes]) -> None:
    """Write the lines of a domain that fails, since nothing of it will be published."""
    with files.replacing(path) as file:
        file.writelines(content)
