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
from tasks.corpus.prepare import chunk_store
from tasks.corpus.prepare.planning import Plan
from tasks.corpus.records import CorpusError

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


def too_many_bad(
    plan: Plan, domain: str, counts: str, *, rules: dict[str, str], examples: Iterable[bytes]
) -> CorpusError:
    """The error of a domain that fails: how many records are bad, and how many by which rule.

    Writes the lines of the examples beside the plan, since nothing of the domain will be published.
    """
    path = plan.path.with_name(f"rejects-{domain}.jsonl")
    write(path, examples)
    by_rule = "; ".join(f"{rule}: {text}" for rule, text in rules.items())
    return CorpusError(
        f"domain {domain}: {counts}, max_bad allows {plan.corpus.max_bad:.2%}. {by_rule}. "
        f"Correct the file, `format` or `text_field`, or raise `max_bad`; {path} has examples"
    )


def write(path: Path, content: Iterable[bytes]) -> None:
    """Write the lines of a file of rejects."""
    with files.replacing(path) as file:
        file.writelines(content)
