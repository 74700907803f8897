"""Megatron's indexed datasets: NAME.bin, the tokens, and NAME.idx, where each sequence and document is in it.

The layout is that of `megatron.core.datasets.indexed_dataset` (version 1), all little-endian: the magic, u64 version,
u8 code of the token type, u64 sequences, u64 entries of the document index; then i32 tokens of each sequence, i64
byte offset of each sequence, i64 first sequence of each document and, last, the number of sequences. A byte per
sequence may follow (the mode, of multimodal data).
"""

from __future__ import annotations

import io
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from tasks.corpus.readers import streams
from tasks.corpus.readers.base import Piece, Records, UnitReader
from tasks.corpus.records import CorpusError, Document

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tasks.settings import Domain

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Token types by their code; 6 and 7 are floating-point numbers, which are no tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """An .idx file: `sizes` int32 [n] in tokens, `pointers` int64 [n] in bytes, `documents` int64 [documents + 1]."""

    dtype: np.dtype[Any]
    sizes: NDArray[np.int32]
    pointers: NDArray[np.int64]
    documents: NDArray[np.int64]

    def document_bytes(self) -> NDArray[np.int64]:
        """Bytes of tokens in each document."""
        tokens = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])
        return np.diff(tokens[self.documents]) * self.dtype.itemsize


def read_index(file: IO[bytes], *, name: str = "") -> Index:
    """Parse an open .idx file, memory-mapped if it is a local one. Raises CorpusError saying what is wrong with it."""

    def require(is_so: bool, wrong: str) -> None:
        if not is_so:
            raise CorpusError(f"{name or getattr(file, 'name', '.idx')}: {wrong}; write the index again")

    content = _content(file)
    require(len(content) >= HEADER.size, f"{len(content)} bytes are no Megatron index")
    magic, version, code, sequences, entries = HEADER.unpack_from(content)
    require(magic == MAGIC, f"is no Megatron index, it starts with {magic!r}")
    require(version == VERSION, f"is version {version} of Megatron's index, not {VERSION}")
    require(code in TYPES, f"its tokens are of type code {code}, not one of {sorted(TYPES)}")
    size = HEADER.size + 12 * sequences + 8 * entries
    require(len(content) in {size, size + sequences}, f"has {len(content)} bytes, its header says {size}")
    sizes = np.frombuffer(content, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    documents = np.frombuffer(content, "<i8", entries, HEADER.size + 12 * sequences)
    require(not sequences or sizes.min() >= 0, "a sequence has a negative length")
    require(not sequences or pointers.min() >= 0, "a sequence has a negative offset")
    require(
        entries > 0 and documents[0] == 0 and documents[-1] == sequences and bool((np.diff(documents) >= 0).all()),
        f"its document index does not rise from 0 to {sequences}, the number of sequences",
    )
    return Index(dtype=np.dtype(TYPES[code]), sizes=sizes, pointers=pointers, documents=documents)


def _content(file: IO[bytes]) -> bytes | mmap.mmap:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (AttributeError, OSError, ValueError):  # it has no descriptor, or is empty
        return file.read()
    return mapped if len(mapped) == size else file.read()  # a member of an archive has the archive's descriptor


class MegatronReader(UnitReader):
    """Documents that are tokens already: `Document.ids` as stored, all sequences of a document, and no text."""

    def __init__(self, domain: Domain, cache: Path, *, max_record_bytes: int, check: bool) -> None:
        super().__init__(domain, cache, max_record_bytes=max_record_bytes, check=check)
        names = set(self.files)
        self.files = {name: path for name, path in self.files.items() if name.endswith(".bin")}
        self._indexes: dict[str, tuple[Index, NDArray[np.int64]]] = {}
        self._index_paths = {name: f"{path[:-4]}.idx" for name, path in self.files.items()}
        if not self.files:
            raise CorpusError(f"source {domain.source!r} matches no .bin file; format megatron reads .bin and .idx")
        if lone := [name for name in self.files if f"{name[:-4]}.idx" not in names]:
            raise CorpusError(f"{lone[0]}: its .idx is missing; the source must match both files ({domain.source!r})")

    def paths_of(self, name: str) -> list[str]:
        return [self.files[name], self._index_paths[name]]

    def unit_bytes(self, name: str) -> NDArray[np.int64]:
        return self._index(name)[1]

    def records(self, file: IO[bytes], piece: Piece) -> Records:
        index, document_bytes = self._index(piece.path)
        edges = index.documents[piece.start :] if piece.stop is None else index.documents[piece.start : piece.stop + 1]
        too_long = document_bytes[piece.start : piece.stop] > self.max_record_bytes
        row = -1
        for row, (first, last) in enumerate(pairwise(edges.tolist())):
            if too_long[row]:
                yield self.over_long(piece.path, row)
            else:
                parts = [self._sequence(file, index, i) for i in range(first, last)]
                ids = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, index.dtype), *parts])
                yield Document(text="", source=piece.path, row=row, ids=ids)
        return row + 1

    def _sequence(self, file: IO[bytes], index: Index, i: int) -> NDArray[Any]:
        file.seek(int(index.pointers[i]))
        return np.frombuffer(file.read(int(index.sizes[i]) * index.dtype.itemsize), index.dtype)

    def _index(self, name: str) -> tuple[Index, NDArray[np.int64]]:
        """The index of a .bin file, and the bytes of each document."""
        if name not in self._indexes:
            with streams.guarded_open(self.fs, self._index_paths[name]) as file:
                index = read_index(file, name=f"{name[:-4]}.idx")
            ends = index.pointers + index.sizes.astype(np.int64) * index.dtype.itemsize
            size = self.sizes[name]
            if size is not None and len(ends) and (end := int(ends.max())) > size:
                raise CorpusError(
                    f"{name}: has {size} bytes, but its index points up to byte {end}; "
                    "the two files do not belong together, or one was cut short"
                )
            self._indexes[name] = index, index.document_bytes()
        return self._indexes[name]
