"""Documents that hold evaluation items: a shared word n-gram, 13 words in GPT-3 (arXiv 2005.14165, appendix C).

Every string of every record is an item. Words are those of tasks/corpus/words.py: case, punctuation and white space
don't count, digits do. An item shorter than `ngram` words is looked for whole if it has 8, GPT-3's least; shorter ones
would be found in any text, cannot be looked for, and are counted in `Items.short`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tasks import sources
from tasks.corpus import words
from tasks.corpus.records import CorpusError
from tasks.settings import corpus as settings

LEAST = 8
_FILTER_BITS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """The item found, as NAME:ROW of the items' records counted from 0, and the words shared with it."""

    item: str
    ngram: str


class Items:
    """The n-grams of evaluation items. `short` counts the strings too short to be looked for."""

    def __init__(self, labels: list[str], texts: list[str], *, ngram: int) -> None:
        """`texts[i]` is looked for under the name `labels[i]`."""
        self._labels, self._words = labels, words.split(texts)
        counts = np.diff(self._words.offsets)
        self.short = int((counts < min(ngram, LEAST)).sum())
        self._tables = {}
        for size in range(min(ngram, LEAST), ngram + 1):
            chosen = counts >= size if size == ngram else counts == size
            if chosen.any():
                self._tables[size] = _Table(self._words, chosen, size=size)

    @classmethod
    def load(cls, decontaminate: settings.Decontaminate, cache: Path) -> Items:
        """Read the items of the settings; archives are kept in `cache`.

        Raises:
            SourceError: a source cannot be had. CorpusError: a line of it is not JSON.
        """
        found = [pair for items in decontaminate.items for pair in _read(items, cache)]
        return cls([label for label, _ in found], [text for _, text in found], ngram=decontaminate.ngram)

    def hit(self, text: str) -> Hit | None:
        """An item that the text holds, or an n-gram of one; the longest, and of those the first in the text."""
        found = words.split([text])
        for size, table in reversed(self._tables.items()):
            for here, there in table.candidates(found.hashes):
                ngram = found.text(here, size)
                if ngram == self._words.text(there, size):
                    item = int(self._words.offsets.searchsorted(there, side="right")) - 1
                    return Hit(item=self._labels[item], ngram=ngram)
        return None


class _Table:
    """The runs of `size` words within the chosen texts, by hash."""

    def __init__(self, split: words.Words, chosen: NDArray[np.bool_], *, size: int) -> None:
        self._size = size
        inside = np.repeat(chosen, np.diff(split.offsets))
        for end in split.offsets[1:]:
            inside[max(end - size + 1, 0) : end] = False
        places = np.flatnonzero(inside)
        hashes, at = np.unique(words.ngrams(split.hashes, size)[places], return_index=True)
        self._hashes, self._places = hashes, places[at]
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._filter[self._short(hashes)] = True

    def candidates(self, hashes: words.Hashes) -> Iterator[tuple[int, int]]:
        """Where in a text, and where in the items' words, runs of equal hash begin."""
        grams = words.ngrams(hashes, self._size)
        for here in np.flatnonzero(self._filter[self._short(grams)]):
            at = int(self._hashes.searchsorted(grams[here]))
            if at < len(self._hashes) and self._hashes[at] == grams[here]:
                yield int(here), int(self._places[at])

    @staticmethod
    def _short(hashes: words.Hashes) -> NDArray[np.int64]:
        return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)


def _read(items: settings.Items, cache: Path) -> Iterator[tuple[str, str]]:
    fetched = sources.fetch(items.source, cache, sha256=items.sha256)
    row = 0
    for path in fetched.paths:
        with fetched.fs.open(path, compression="infer") as file:
            for number, line in enumerate(file):
                if not line.strip():
                    continue
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise CorpusError(
                        f"decontaminate.items {items.name}: {path}, line {number + 1} is not JSON ({error}); items "
                        "are JSON lines: correct the file or `source`"
                    ) from error
                yield from ((f"{items.name}:{row}", text) for text in _strings(record))
                row += 1


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
