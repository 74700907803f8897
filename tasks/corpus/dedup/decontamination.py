"""Documents that hold evaluation items: a shared word n-gram, 13 words in GPT-3 (arXiv 2005.14165, appendix C).

Every string of every record is an item. Words are those of words.py: case, punctuation and white space don't
count, digits do. An item shorter than `ngram` words is looked for whole if it has 8, GPT-3's least; shorter ones
would be found in any text, cannot be looked for, and are counted in `Items.short`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tasks import sources
from tasks.corpus import source_versions
from tasks.corpus.dedup import words
from tasks.corpus.readers import streams
from tasks.corpus.records import CorpusError
from tasks.settings import corpus as settings

LEAST = 8
_FILTER_BITS = 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """The item found, as NAME:ROW of the items' records counted from 0, and the words shared with it."""

    item: str
    ngram: str


class Items:
    """What evaluation items hold: `ngrams` counts what is looked for, `short` the strings too short for it."""

    def __init__(self, labels: Sequence[str], texts: Sequence[str], *, ngram: int) -> None:
        """`texts[i]` is looked for under the name `labels[i]`."""
        self._labels, self._words = labels, words.split(texts)
        counts = np.diff(self._words.offsets)
        least = min(ngram, LEAST)
        self.short = int((counts < least).sum())
        left = np.repeat(self._words.offsets[1:], counts) - np.arange(len(self._words.hashes))
        grams = words.ngrams(self._words.hashes, ngram)
        places = np.flatnonzero(left[: len(grams)] >= ngram)
        places = places[np.unique(grams[places], return_index=True)[1]]
        whole = self._words.offsets[:-1][(counts >= least) & (counts < ngram)]  # found by their first words
        self._tables = (
            _Table(self._words, places, size=ngram, lengths=np.full(len(places), ngram)),
            _Table(self._words, whole, size=least, lengths=left[whole]),
        )
        self.ngrams = len(places) + len(whole)

    @classmethod
    def load(
        cls, decontaminate: settings.Decontaminate, cache: Path, *, versions: dict[str, dict[str, str]] | None = None
    ) -> Items:
        """Read the items of the settings, archives kept in `cache`; `versions` come from source_versions.record.

        Raises:
            SourceError: a source cannot be had, or is not of the versions.
            CorpusError: a file of it is damaged, or a line is not JSON.
        """
        pairs = [pair for items in decontaminate.items for pair in _read(items, cache, versions or {})]
        return cls([label for label, _ in pairs], [text for _, text in pairs], ngram=decontaminate.ngram)

    def hit(self, text: str) -> Hit | None:
        """The first n-gram in a text that an item has too, or else the first item that is shorter and whole in it."""
        return self.hits([text])[0]

    def hits(self, texts: Sequence[str]) -> list[Hit | None]:
        """`hit` of each text; many texts at once take less time."""
        out: list[Hit | None] = [None] * len(texts)
        for start, end in words.batches(texts):
            split = words.split(texts[start:end])
            for table in self._tables:
                for here, candidates in table.candidates(split.hashes):
                    text = int(split.offsets.searchsorted(here, side="right")) - 1
                    if out[start + text] is None:
                        room = int(split.offsets[text + 1]) - here
                        out[start + text] = self._match(split, here, room=room, candidates=candidates)
        return out

    def _match(self, split: words.Words, here: int, *, room: int, candidates: list[list[int]]) -> Hit | None:
        for there, length in candidates:
            if length <= room and split.text(here, length) == self._words.text(there, length):
                item = int(self._words.offsets.searchsorted(there, side="right")) - 1
                return Hit(item=self._labels[item], ngram=self._words.text(there, length))
        return None


class _Table:
    """Places in the items' words by the hash of the `size` words there; lengths[i] words from places[i] must match."""

    def __init__(
        self, split: words.Words, places: NDArray[np.int64], *, size: int, lengths: NDArray[np.int64]
    ) -> None:
        hashes = words.ngrams(split.hashes, size)[places]
        order = np.argsort(hashes, kind="stable")
        self._size, self._hashes, self._sought = size, hashes[order], np.column_stack([places, lengths])[order]
        self._bits = min(max(8 * len(hashes), 2).bit_length(), _FILTER_BITS)  # one in eight of other words passes
        self._maybe = np.zeros(1 << self._bits, dtype=bool)
        self._maybe[self._leading(hashes)] = True

    def candidates(self, hashes: words.Hashes) -> Iterator[tuple[int, list[list[int]]]]:
        """A place in texts; places in the items' words, and how many words are to be equal from there on."""
        if not len(self._hashes):
            return
        grams = words.ngrams(hashes, self._size)
        here = np.flatnonzero(self._maybe[self._leading(grams)])
        first = self._hashes.searchsorted(grams[here])
        last = self._hashes.searchsorted(grams[here], side="right")
        for i in np.flatnonzero(first < last):
            yield int(here[i]), self._sought[first[i] : last[i]].tolist()

    def _leading(self, hashes: words.Hashes) -> NDArray[np.int64]:
        return (hashes >> np.uint64(64 - self._bits)).astype(np.int64)


def _read(items: settings.Items, cache: Path, versions: dict[str, dict[str, str]]) -> list[tuple[str, str]]:
    name = f"items {items.name}"
    pairs: list[tuple[str, str]] = []
    row = 0
    try:
        fetched = sources.fetch(items.source, cache, sha256=items.sha256)
        with fetched.unchanged(versions.get(name), fix=source_versions.fix(items)):
            for path in fetched.paths:
                with streams.guarded_open(fetched.fs, path, sequential=True) as raw:
                    for record in _records(streams.decompress(raw, path), f"decontaminate.{name}: {path}"):
                        pairs += [(f"{items.name}:{row}", text) for text in _strings(record)]
                        row += 1
    except sources.SourceError as error:
        raise sources.SourceError(f"{name}: {error}") from error
    return pairs


def _records(file: IO[bytes], where: str) -> Iterator[Any]:
    number = 0
    try:
        for line in file:
            number += 1
            if line.strip():
                yield orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise CorpusError(
            f"{where}, line {number} is not JSON ({error}); items are JSON lines: correct the file or `source`"
        ) from error
    except streams.CORRUPT as error:
        raise CorpusError(f"{where} is damaged after line {number} ({error}); fetch it again") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
