"""Decompression by file name that notices a stream cut short.

fsspec picks the codec by the name's ending; its zstd reader ends quietly at a missing tail, Arrow's does not.
"""

from __future__ import annotations

import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from fsspec.compression import compr
from fsspec.utils import infer_compression

from tasks import sources
from tasks.corpus import files

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK = 1 << 20
CORRUPT = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged stream raises (gzip.BadGzipFile is an OSError)."""


class ReadError(RuntimeError):
    """A store or archive failed while a file was read: nothing is known about the records, so none is counted bad."""


def bytes_read(file: IO[bytes]) -> int:
    """How many bytes a guarded file has given."""
    raw = getattr(file, "raw", None)
    return raw.count if isinstance(raw, _Guarded) else 0


@contextmanager
def guarded_open(fs: AbstractFileSystem, path: str, *, sequential: bool = False) -> Iterator[IO[bytes]]:
    """Open a file of a store, to read it in any order or only once from its start; what fails is a ReadError."""
    try:
        opened = sources.open_sequential(fs, path) if sequential else fs.open(path, "rb")
    except Exception as error:  # every store has errors of its own
        raise _read_error(path, error) from error
    with opened, io.BufferedReader(_Guarded(opened, path), BLOCK) as file:
        yield file


def has_ranges(fs: AbstractFileSystem, path: str) -> bool:
    """Whether a web server gives the end of a file without the rest."""
    try:
        with guarded_open(fs, path) as file:
            file.seek(-1, io.SEEK_END)
            return len(file.read(1)) == 1
    except ReadError as error:
        if isinstance(error.__cause__, ValueError):  # fsspec's, for a server that sends the whole file
            return False
        raise


def codec_of(path: str) -> str | None:
    """gzip, zstd, bz2, xz, … by the name's ending; None for a plain file."""
    if "://" in path:
        path = path.partition("?")[0]
    return "zstd" if path.endswith((".zst", ".zstd")) else infer_compression(path)


def decompress(file: IO[bytes], path: str) -> IO[bytes]:
    """The bytes of a file, decompressed if its name says so, a bounded number at a time."""
    codec = codec_of(path)
    if codec is None:
        return file
    if codec == "zstd":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), BLOCK)
    return io.BufferedReader(compr[codec](file, mode="rb"), BLOCK)


def _read_error(path: str, error: Exception) -> ReadError:
    if (cause := files.machine_error(error, path)) is not None:
        return ReadError(f"{path}: {cause.strerror}; finished parts are kept")
    return ReadError(
        f"{path}: reading failed ({type(error).__name__}: {error}); run again, finished parts are kept. "
        "If it is in a package and fails again, the archive under .scratch/sources is damaged: delete it"
    )


class _Guarded(io.RawIOBase):
    """A file whose own failures are ReadErrors, never taken for damage inside it."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        self._file, self._path = file, path
        self.count = 0  # bytes read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._file.read(len(buffer))
        except Exception as error:  # every store has errors of its own
            raise _read_error(self._path, error) from error
        buffer[: len(content)] = content
        self.count += len(content)
        return len(content)
