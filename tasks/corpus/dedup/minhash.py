"""MinHash-LSH signatures (Broder 1997; bands as in FineWeb, arXiv 2406.17557, section 3.4).

Shingles are word n-grams (words.py), with their digits or with 0 for each. Minima are rensa's R-MinHash.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray
from rensa import RMinHash

from tasks.corpus.dedup import words

_SEED = 1
_ONE_THREAD = 32  # rensa takes more documents to threads of its own: not to be forked, and too many beside others


class Signer:
    """Signs texts with `bands` x `rows` minima over shingles of `ngram` words; the same on every machine.

    `digits`: whether texts that differ in their digits alone are different ones.
    """

    def __init__(self, bands: int, rows: int, *, ngram: int, digits: bool = True) -> None:
        self.size, self.rows, self.ngram, self.digits = bands * rows, rows, ngram, digits

    def bands(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """Per text a hash of each band's minima, uint64 [n, bands]; two texts meet where one column is equal."""
        minima = self.signatures(texts).reshape(len(texts), self.size // self.rows, self.rows)
        out = np.zeros(minima.shape[:2], dtype=np.uint64)
        for row in range(self.rows):
            out = words.mix(out + minima[:, :, row].astype(np.uint64))
        return out

    def signatures(self, texts: Sequence[str]) -> NDArray[np.uint32]:
        """The minima, uint32 [n, bands * rows]. The share of equal ones estimates the Jaccard similarity."""
        out = np.empty((len(texts), self.size), dtype=np.uint32)
        for start, end in words.batches(texts):
            shingles, offsets = self.shingles(texts[start:end])
            out[start:end] = minima(shingles, offsets, size=self.size)
        return out

    def shingles(self, texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Hashes of all shingles, flat uint64, and where each text's begin and end in them, uint64 [n + 1].

        A text of fewer words than `ngram` is one shingle; one without a word is a shingle of its characters.
        """
        split = words.split(texts, digits=self.digits)
        count = np.diff(split.offsets)
        grams = words.ngrams(split.hashes, self.ngram)
        short = count < self.ngram
        sizes = np.where(short, 1, count - self.ngram + 1)
        offsets = np.concatenate([[0], sizes.cumsum()]).astype(np.uint64)
        out = np.empty(int(offsets[-1]), dtype=np.uint64)
        whole = np.ones(len(out), dtype=bool)
        whole[offsets[:-1][short].astype(np.int64)] = False
        left = np.repeat(split.offsets[1:], count) - np.arange(len(split.hashes))
        out[whole] = grams[left[: len(grams)] >= self.ngram]
        for i in np.flatnonzero(short):
            own = split.hashes[split.offsets[i] : split.offsets[i + 1]]
            out[int(offsets[i])] = words.ngrams(own, len(own))[0] if len(own) else _whole(texts[int(i)])
        return out, offsets


def alone(doc_ids: Sequence[bytes], bands: int) -> NDArray[np.uint64]:
    """Bands uint64 [n, bands] of documents that are near-duplicates of none: hashes of their own `doc_id`."""
    low, high = np.frombuffer(b"".join(doc_ids), dtype="<u8").reshape(-1, 2).T
    own = words.mix(words.mix(low.copy()) + high)
    return words.mix(np.add(own[:, None], np.arange(bands, dtype=np.uint64), dtype=np.uint64))


def minima(shingles: NDArray[np.uint64], offsets: NDArray[np.uint64], *, size: int) -> NDArray[np.uint32]:
    """`size` minima over n sets of hashes, uint32 [n, size]; set i is shingles[offsets[i] : offsets[i + 1]]."""
    rows: list[list[int]] = []
    for start in range(0, len(offsets) - 1, _ONE_THREAD):
        part = offsets[start : start + _ONE_THREAD + 1]
        own = shingles[int(part[0]) : int(part[-1])]
        rows += RMinHash.digest_matrix_from_flat_token_hashes(own, part - part[0], size, _SEED).to_rows()
    return np.array(rows, dtype=np.uint32).reshape(-1, size)


def _whole(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
