"""Decompression by file name that notices a stream cut short.

fsspec picks the codec by the name's ending; its zstd reader ends quietly at a missing tail, so zstd is read here.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import zipfile
import zlib
from typing import IO, Any

from fsspec.compression import compr
from fsspec.utils import infer_compression

BLOCK = 1 << 20


class TruncatedError(EOFError):
    """A compressed file ends before its stream does."""


class _ZstdError(OSError):
    """A zstd frame that cannot be decoded."""


CORRUPT = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged stream raises (gzip.BadGzipFile is an OSError)."""


_STORE_FAILED = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError)


class ReadError(RuntimeError):
    """A store or archive failed while a file was read: nothing is known about the records, so none is counted bad."""


def guard(file: IO[bytes], path: str) -> IO[bytes]:
    """A file whose own failures are ReadErrors, never taken for damage inside it."""
    return io.BufferedReader(_Guarded(file, path), BLOCK)


def codec_of(path: str) -> str | None:
    """gzip, zstd, bz2, xz, … by the name's ending; None for a plain file."""
    return infer_compression(path)


def decompress(file: IO[bytes], path: str) -> IO[bytes]:
    """The bytes of a file, decompressed if its name says so."""
    codec = codec_of(path)
    if codec == "zstd":
        return io.BufferedReader(_Zstd(file), BLOCK)
    return compr[codec](file, mode="rb") if codec else file


class _Guarded(io.RawIOBase):
    def __init__(self, file: IO[bytes], path: str) -> None:
        self._file, self._path = file, path

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
        except _STORE_FAILED as error:
            raise ReadError(
                f"{self._path}: reading failed ({type(error).__name__}: {error}); run again, finished parts are kept. "
                "If it fails again, the downloaded archive under .scratch/sources is damaged: delete it"
            ) from error
        buffer[: len(content)] = content
        return len(content)


class _Zstd(io.RawIOBase):
    """A zstd file of one or more frames; raises TruncatedError at a missing tail."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._zstandard = zstandard
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and not (block := self._file.read(BLOCK)):
                if self._frame is not None:
                    raise TruncatedError("the zstd stream ends before its end marker")
                return 0
            self._input = self._input or block
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._zstandard.ZstdError as error:
                raise _ZstdError(str(error)) from error
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        view = memoryview(buffer).cast("B")
        n = min(len(view), len(self._output))
        view[:n] = self._output[:n]
        self._output = self._output[n:]
        return n
