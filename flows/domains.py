"""A corpus's domains as a table: documents, tokens and what each rule dropped, from data/corpora/NAME.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

CORPORA = Path("data/corpora")


def rows(metrics: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each domain, if a corpus's metrics are among a stage's metric files; else none.

    Shares are percentages: of the corpus's tokens, and of the domain's records for each rule that dropped any.
    """
    for path in metrics:
        if path.parent == CORPORA and path.exists() and "sha256" in (corpus := json.loads(path.read_text())):
            return _rows(corpus)
    return []


def table(corpus: str) -> Table:
    """The domains of a corpus for the terminal."""
    from rich.table import Table

    result = Table(title=f"{corpus}: domains", title_justify="left")
    lines = rows([CORPORA / f"{corpus}.json"])
    for column in lines[0] if lines else ():
        result.add_column(column, justify="left" if column == "domain" else "right")
    for row in lines:
        result.add_row(*(value if isinstance(value, str) else f"{value:,}" for value in row.values()))
    return result


def _rows(corpus: dict[str, Any]) -> list[dict[str, Any]]:
    rules = {name: domain["rules"] for name, domain in corpus["domains"].items()}
    dropping = sorted({rule for counts in rules.values() for rule, n in counts.items() if n} - {"read", "kept"})
    return [
        {
            "domain": name,
            "documents": sum(domain["documents"].values()),
            "tokens": (tokens := sum(domain["tokens"].values())),
            "share %": round(100 * tokens / corpus["tokens"], 2),
            "bytes/token": round(domain["bytes_per_token"], 2),
            "tokens/s": domain["tokens_per_second"],
            **{f"{rule} %": round(100 * rules[name].get(rule, 0) / rules[name]["read"], 2) for rule in dropping},
        }
        for name, domain in corpus["domains"].items()
    ]
