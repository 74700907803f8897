"""The words of texts as 64-bit hashes, for MinHash and for decontamination.

A word is a run of letters, digits and combining marks (`str.isalnum`, Unicode's category M) after NFKC and simple case
folding; all else separates. Characters of scripts written without spaces are words of their own.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from tasks.corpus.records import runs

Hashes = NDArray[np.uint64]

_BATCH_CHARS = 1 << 18  # what stays in the cache
_SPACE = ord(" ")
_STRIDE = 8
_LONG = 64  # bytes; longer words, mostly encoded data, are hashed one by one
_MULTIPLY = (0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD)  # golden ratio, MurmurHash3's finaliser
_HALF = np.uint64(32)
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(_STRIDE + 1)], dtype=np.uint64)
_ALONE = 1 << 24
_SCRIPTS = 0x20000  # above are ideographs, and characters of no script
# Thai and Lao, Myanmar, Khmer, kana, Han with its extensions
_UNSPACED = (
    *((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100)),
    *((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32400)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The words of n texts: `hashes` uint64 [words], each beginning at `start`, int64 [words], of `content`.

    Text i has the words `offsets[i]` to `offsets[i + 1]`, int64 [n + 1].
    """

    content: bytes
    hashes: Hashes
    start: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def text(self, first: int, count: int) -> str:
        """`count` words from `first`, joined by single spaces."""
        where = (int(start) for start in self.start[first : first + count])
        return b" ".join(self.content[start : self.content.index(b" ", start)] for start in where).decode()


def split(texts: Sequence[str], *, digits: bool = True) -> Words:
    """The words of texts. Without `digits`, every ASCII digit counts as 0, so that dates and counters are alike."""
    table = _ascii(digits)
    parts = [_plain(text).translate(table) for text in texts]
    # A space on either side of all: every word has an edge on both, and eight bytes can be read from any start.
    content = b" " + b" ".join(parts) + b" " * _STRIDE
    inside = np.frombuffer(content, dtype=np.uint8) != _SPACE
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    start, end = edges[::2], edges[1::2]
    begins = np.cumsum([1] + [len(part) + 1 for part in parts])
    return Words(content=content, hashes=_hash(content, start, end), start=start, offsets=start.searchsorted(begins))


def batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Runs of texts, (first, end) each, that `split` does fastest; a long text is a run of its own."""
    return runs(map(len, texts), most=_BATCH_CHARS)


def ngrams(hashes: Hashes, n: int) -> Hashes:
    """A hash for every run of n words, uint64 [max(words - n + 1, 0)]."""
    if len(hashes) < n:
        return np.empty(0, dtype=np.uint64)
    width = 1
    while width < n:  # two runs of `width` make one of twice as many words; the last two may overlap
        step = min(width, n - width)
        hashes = hashes[:-step] * np.uint64(pow(_MULTIPLY[0], width, 1 << 64)) + hashes[step:]
        width += step
    return mix(hashes + np.uint64(n))


def mix(values: Hashes) -> Hashes:
    """Spread every bit over all 64, in place: a bijection."""
    for multiplier in _MULTIPLY:
        values ^= values >> _HALF
        values *= np.uint64(multiplier)
    values ^= values >> _HALF
    return values


def _hash(content: bytes, start: NDArray[np.int64], end: NDArray[np.int64]) -> Hashes:
    """Eight bytes at a time: x <- mix(x + the next eight)."""
    loads = np.ndarray(len(content) - _STRIDE + 1, dtype="<u8", buffer=content, strides=(1,))
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
    return text.encode() if text.isascii() else b"".join(_plain_piece(piece) for piece in _cut(text))


def _cut(text: str) -> Iterator[str]:
    """A long text in pieces, cut before spaces, where no word ends up in two and NFKC composes no characters."""
    start = 0
    while len(text) - start > _BATCH_CHARS and (end := text.find(" ", start + _BATCH_CHARS)) > 0:
        yield text[start:end]
        start = end
    yield text[start:]


def _plain_piece(text: str) -> bytes:
    text = unicodedata.normalize("NFKC", text)
    codes = _folded()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")]
    alone = codes >= _ALONE
    if alone.any():
        copies = np.where(alone, 3, 1)  # a space on either side
        spread = np.full(copies.sum(), _SPACE, dtype="<u4")
        spread[copies.cumsum() - copies + alone] = codes & (_ALONE - 1)
        codes = spread
    encoded: bytes = codes.tobytes().decode("utf-32-le").encode()
    return encoded


@functools.cache
def _folded() -> NDArray[np.uint32]:
    """Per code point its lower case (full folding where that is one), or a space; ones that stand alone + _ALONE."""
    scripts = [chr(code) for code in range(_SCRIPTS)]
    folded = np.full(0x110000, _SPACE, dtype="<u4")
    folded[:_SCRIPTS] = [
        ord(next(form for form in (char.casefold(), char.lower(), char) if len(form) == 1))
        if char.isalnum() or unicodedata.category(char)[0] == "M"
        else _SPACE
        for char in scripts
    ]
    for first, stop in _UNSPACED:
        folded[first:stop] = np.arange(first, stop) + _ALONE
    return folded
