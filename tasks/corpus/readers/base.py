"""What a reader is: it lists the tasks of a domain, each a few pieces of files, and reads one piece.

Pieces are cut by size, but never change what is read: a record belongs to the piece in which its first byte lies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from fsspec.archive import AbstractArchiveFileSystem

from tasks import sources
from tasks.corpus.readers import streams
from tasks.corpus.records import Record, Reject

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tasks.settings import Domain

Records = Generator[Record, None, int]
"""The records of a piece, with rows counted from 0 inside it; returns how many rows it has, blank ones included."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a file: from `start` to `stop` (None: its end), in what its format is cut by (bytes, row groups, …).

    `path` is the file's name in the records, which is the same on every machine.
    """

    path: str
    start: int = 0
    stop: int | None = None


class Reader(ABC):
    """Reads one domain. A pure function of the domain and of what its source holds."""

    has_ids = False
    """Whether its documents come as token ids, so that the scan depends on the tokenizer."""

    @abstractmethod
    def __init__(self, domain: Domain, cache: Path, *, max_record_bytes: int, check: bool) -> None: ...

    @abstractmethod
    def tasks(self, *, task_bytes: int) -> list[tuple[Piece, ...]]:
        """All pieces of the domain, in order, in groups of about `task_bytes` of input."""

    @abstractmethod
    def read(self, piece: Piece) -> Records:
        """The records of a piece. Raises CorpusError if its file is of no use at all, ReadError if the store fails."""

    @abstractmethod
    def fetched(self, task: tuple[Piece, ...]) -> sources.Fetched | None:
        """The files of which a task reads; None if the source's text alone fixes their bytes."""

    @abstractmethod
    def size(self, piece: Piece) -> int:
        """About how many bytes of input a piece has."""

    def bytes_read(self) -> int:
        """At least how many bytes of the piece that is being read its records so far came from; 0 if unknown."""
        return 0


class FileReader(Reader):
    """A reader of files, opened through fsspec, one after the other."""

    is_decompressed = True
    """Whether a file whose name says so is decompressed; a format that needs its end first brings its own codec."""

    def __init__(self, domain: Domain, cache: Path, *, max_record_bytes: int, check: bool) -> None:
        sha256 = domain.sha256 if check else None
        fetched = sources.fetch(domain.source, cache, sha256=sha256, sdist=domain.sdist)
        self._fetched = fetched
        self.fs = fetched.fs
        self.files = {fetched.name_of(path): path for path in fetched.sizes}
        self.sizes = {name: fetched.sizes[path] for name, path in self.files.items()}
        self.field = domain.text_field
        self.max_record_bytes = max_record_bytes
        self._opened: IO[bytes] | None = None

    def tasks(self, *, task_bytes: int) -> list[tuple[Piece, ...]]:
        pieces = (piece for name in self.files for piece in self.pieces(name, task_bytes=task_bytes))
        return grouped(((piece, self.size(piece)) for piece in pieces), task_bytes=task_bytes)

    def pieces(self, name: str, *, task_bytes: int) -> list[Piece]:
        """The pieces of one file: by default it is one."""
        return [Piece(name)]

    def fetched(self, task: tuple[Piece, ...]) -> sources.Fetched:
        names = dict.fromkeys(piece.path for piece in task)
        return self._fetched.only([path for name in names for path in self.paths_of(name)])

    def paths_of(self, name: str) -> list[str]:
        """The paths on its store of what is read as one file."""
        return [self.files[name]]

    def size(self, piece: Piece) -> int:
        return (self.bytes_of(piece.path) if piece.stop is None else piece.stop) - piece.start

    def read(self, piece: Piece) -> Records:
        name = piece.path
        if self.is_decompressed and streams.codec_of(name) and self.sizes[name] == 0:  # gzip takes it for whole
            yield Reject(rule="corrupt stream", source=name, row=0, detail="a compressed file of 0 bytes")
            return 1
        with self.open(name, sequential=self.is_decompressed and piece == Piece(name)) as raw:
            self._opened = raw
            return (yield from self.records(streams.decompress(raw, name) if self.is_decompressed else raw, piece))

    def bytes_read(self) -> int:
        if self._opened is None or not self.is_decompressed:  # a parquet file is read ahead, by row groups
            return 0
        return max(streams.bytes_read(self._opened) - 2 * streams.BLOCK, 0)  # two buffers may be full

    def open(self, name: str, *, sequential: bool = False) -> AbstractContextManager[IO[bytes]]:
        """A file as its store has it."""
        return streams.guarded_open(self.fs, self.files[name], sequential=sequential)

    def bytes_of(self, name: str) -> int:
        """The size of a file on its store; 0 if that does not say."""
        return self.sizes[name] or 0

    @abstractmethod
    def records(self, file: IO[bytes], piece: Piece) -> Records:
        """The records of a piece of an open file."""

    def over_long(self, name: str, row: int) -> Reject:
        """A record of more than `max_record_bytes`, which was not kept in memory."""
        detail = f"more than max_record_bytes = {self.max_record_bytes}"
        return Reject(rule="over-long record", source=name, row=row, detail=detail)

    def is_cuttable(self, name: str, *, task_bytes: int) -> bool:
        """Whether a file is larger than a task, and its store opens it in its middle (archives do, but slowly)."""
        if self.bytes_of(name) <= task_bytes or isinstance(self.fs, AbstractArchiveFileSystem):
            return False
        return "http" not in self.fs.protocol or streams.has_ranges(self.fs, self.files[name])


class UnitReader(FileReader):
    """A reader of files that hold units (row groups, documents) and are cut between them."""

    is_decompressed = False

    @abstractmethod
    def unit_bytes(self, name: str) -> NDArray[np.int64]:
        """Bytes of each unit of a file."""

    def pieces(self, name: str, *, task_bytes: int) -> list[Piece]:
        if not self.is_cuttable(name, task_bytes=task_bytes):
            return [Piece(name)]
        sizes = self.unit_bytes(name)
        starts = np.cumsum(sizes) - sizes  # a unit is in the piece in which its first byte lies
        edges = [0, *(np.flatnonzero(np.diff(starts // task_bytes)) + 1).tolist(), len(sizes)]
        return [Piece(name, start, stop) for start, stop in pairwise(edges) if start < stop]

    def size(self, piece: Piece) -> int:
        if piece.stop is None:
            return self.bytes_of(piece.path)
        return int(self.unit_bytes(piece.path)[piece.start : piece.stop].sum())


def grouped(sized: Iterable[tuple[Piece, int]], *, task_bytes: int) -> list[tuple[Piece, ...]]:
    """Pieces in their order, as many to a group as `task_bytes` holds, at least one."""
    groups: list[list[Piece]] = []
    left = 0
    for piece, size in sized:
        if not groups or size > left:
            groups.append([])
            left = task_bytes
        groups[-1].append(piece)
        left -= size
    return [tuple(group) for group in groups]
