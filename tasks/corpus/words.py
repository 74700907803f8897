"""The words of texts as 64-bit hashes, for MinHash and for decontamination, at 100 MB per CPU-second.

A word is a run of letters, digits and combining marks after NFKC and case folding, as `str.isalnum` and Unicode's
category M have it; all else separates. Characters of scripts written without spaces are a word each.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_SPACE = ord(" ")
_STRIDE = 8
_LONG = 64  # bytes; longer words, mostly encoded data, are hashed one by one
_MULTIPLY = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD))  # golden ratio, MurmurHash3's finaliser
_HALF = np.uint64(32)
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(_STRIDE + 1)], dtype=np.uint64)
# Thai to Tibetan's end is left out: Tibetan separates syllables. Lao, Myanmar, Khmer, kana, Han and its extensions.
_ALONE = (
    (0x0E00, 0x0F00),
    (0x1000, 0x10A0),
    (0x1780, 0x1800),
    (0x3040, 0x3100),
    (0x3400, 0x4DC0),
    (0x4E00, 0xA000),
    (0xF900, 0xFB00),
    (0x20000, 0x32400),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The words of n texts: `hashes` uint64 [words], the bytes `start` to `end` of `content`, int64 [words] each.

    Text i has the words `offsets[i]` to `offsets[i + 1]`, int64 [n + 1].
    """

    content: bytes
    hashes: Hashes
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def text(self, first: int, count: int) -> str:
        """`count` words from `first`, joined by single spaces."""
        where = range(first, first + count)
        return b" ".join(self.content[self.start[i] : self.end[i]] for i in where).decode()


def split(texts: Sequence[str], *, digits: bool = True) -> Words:
    """The words of texts. Without `digits`, every ASCII digit counts as 0, so that dates and counters are alike."""
    table = _ascii(digits)
    parts = [_plain(text).translate(table) for text in texts]
    # A space on either side of all: every word has an edge on both, and eight bytes can be read from any start.
    content = b" " + b" ".join(parts) + b" " * _STRIDE
    raw = np.frombuffer(content, dtype=np.uint8)
    inside = raw != _SPACE
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    start, end = edges[::2], edges[1::2]
    begins = np.cumsum([1] + [len(part) + 1 for part in parts])
    return Words(
        content=content, hashes=_hash(content, start, end), start=start, end=end, offsets=start.searchsorted(begins)
    )


def ngrams(hashes: Hashes, n: int) -> Hashes:
    """A hash for every run of n words, uint64 [max(words - n + 1, 0)]."""
    count = max(len(hashes) - n + 1, 0)
    out = np.full(count, n, dtype=np.uint64)
    for k in range(n):
        out *= _MULTIPLY[0]
        out += hashes[k : k + count]
    return mix(out)


def mix(values: Hashes) -> Hashes:
    """Spread every bit over all 64, in place: a bijection."""
    for multiplier in _MULTIPLY:
        values ^= values >> _HALF
        values *= multiplier
    values ^= values >> _HALF
    return values


def _hash(content: bytes, start: NDArray[np.int64], end: NDArray[np.int64]) -> Hashes:
    """Eight bytes at a time: x <- mix(x + the next eight), begun at the length."""
    loads = np.ndarray(max(len(content) - _STRIDE + 1, 0), dtype="<u8", buffer=content, strides=(1,))
    length = end - start
    out = mix(loads[start] & _MASKS[np.minimum(length, _STRIDE)])
    more = np.flatnonzero(length > _STRIDE)
    for done in range(_STRIDE, _LONG, _STRIDE):
        if not len(more):
            return out
        next_eight = loads[start[more] + done] & _MASKS[np.minimum(length[more] - done, _STRIDE)]
        out[more] = mix(out[more] + next_eight)
        more = more[length[more] > done + _STRIDE]
    for i in more:
        out[i] = xxhash.xxh3_64_intdigest(content[start[i] : end[i]])
    return out


@functools.cache
def _ascii(digits: bool) -> bytes:
    """Lower case, and a space for what is in no word; bytes of other characters stay."""
    table = bytearray(range(256))
    for code in range(128):
        table[code] = ord(chr(code).lower()) if chr(code).isalnum() else _SPACE
    if not digits:
        table[ord("0") : ord("9") + 1] = b"0" * 10
    return bytes(table)


def _plain(text: str) -> bytes:
    """UTF-8 in which only spaces and other ASCII separate words."""
    if text.isascii():
        return text.encode()
    folded = unicodedata.normalize("NFKC", text).casefold()
    codes = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    kind = _kinds()[codes]
    codes = np.where(kind == 0, _SPACE, codes)
    if (kind == 2).any():
        copies = np.where(kind == 2, 3, 1)
        middle = np.cumsum(copies) - copies + (kind == 2)
        spread = np.full(copies.sum(), _SPACE, dtype="<u4")
        spread[middle] = codes
        codes = spread
    return codes.astype("<u4", copy=False).tobytes().decode("utf-32-le").encode()


@functools.cache
def _kinds() -> NDArray[np.uint8]:
    """Per code point: 0 separates, 1 is part of a word, 2 is a word by itself."""
    kinds = np.zeros(0x110000, dtype=np.uint8)
    last = 0x1FFFF  # letters of scripts; above it are ideographs, and characters for private use
    kinds[: last + 1] = [c.isalnum() or unicodedata.category(c)[0] == "M" for c in map(chr, range(last + 1))]
    for first, stop in _ALONE:
        kinds[first:stop] = 2
    return kinds
