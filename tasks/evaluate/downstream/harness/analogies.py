"""Reads word2vec's questions-words.txt: four words a line, and lines that begin with a colon between the kinds."""

from __future__ import annotations

from typing import Any

SEED = 0
WORDS = ("first", "second", "third", "fourth")


def process_docs(dataset: Any) -> Any:
    """Items {first, second, third, fourth} of a data set of lines, in an order in which a limit takes all kinds."""
    lines = dataset.filter(lambda item: item["text"].strip() and not item["text"].startswith(":"))
    return lines.map(process_doc, remove_columns="text").shuffle(seed=SEED)


def process_doc(item: dict[str, Any]) -> dict[str, Any]:
    """The four words of a line."""
    return dict(zip(WORDS, item["text"].split(), strict=True))
