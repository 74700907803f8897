"""What a file holds, told without reading it twice: SHA-256 by stamp, kept for every process that reads the source.

A stamp is what a file system or a store tells of a file for nothing. That of a local file has its inode, size and
times; no program can set the last of them (ctime), so a file written anew has another stamp, whatever its size and
modification time. A store's stamp may hold a version of the content (ETag, md5, generation, …), which stands for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import tasks.sources.local as local
from tasks import scratch
from tasks.sources.syntax import SourceError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_VERSIONS = (
    *("ETag", "etag", "e_tag", "Content-MD5", "content_md5", "Digest", "md5", "md5Hash", "md5Checksum", "crc32c"),
    *("generation", "VersionId", "version_id", "sha", "sha256", "hex", "blob_id", "oid", "checksum", "content_hash"),
)
"""What stores call a version of a file's content: S3, GCS, Azure, the hub, GitHub, git, WebDAV, web servers. The first
that a store knows is taken: listings and questions for one file tell different numbers of them."""
_TIMES = ("LastModified", "Last-Modified", "last_modified", "modified", "modify", "mtime", "updated", "time")
_YOUNG = 2.0
"""Seconds in which a file may be written again with the times that it had: file systems count coarsely."""
_BLOCK = 1 << 20


Listing = dict[str, dict[str, Any]]
"""{path: what a store tells of it}"""


@dataclass(frozen=True, slots=True)
class Stamp:
    """`text` changes when the file does; `is_version`: it names the content; `is_young`: it may not yet."""

    text: str
    is_version: bool = False
    is_young: bool = False


def stamp(fs: AbstractFileSystem, path: str, *, listed: dict[str, Any] | None = None) -> Stamp:
    """What is known of a file without reading it. Raises SourceError if it is gone.

    A store is asked for the file unless `listed`, what it told in a listing, has a version of it.
    """
    if "local" in fs.protocol:
        status = local.regular(path)
        is_young = time.time() - max(status.st_mtime, status.st_ctime) < _YOUNG
        text = f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        return Stamp(text, is_young=is_young)
    if listed is not None and (version := _version(listed)):
        return Stamp(version, is_version=True)
    try:
        fs.invalidate_cache()  # else some stores give what they were told when the source was listed
        info = fs.info(path)
    except Exception as error:  # every store has errors of its own
        raise SourceError(f"{path} cannot be asked for ({type(error).__name__}: {error}); run again") from error
    if version := _version(info):
        return Stamp(version, is_version=True)
    return Stamp(repr([info.get("size"), {field: str(info[field]) for field in _TIMES if info.get(field)}]))


def _version(info: dict[str, Any]) -> str:
    """Size and version of a file by what its store tells of it; empty if that is no version."""
    field = next((field for field in _VERSIONS if _is_strong(info.get(field))), None)
    return repr([info.get("size"), field, info[field]]) if field else ""


def _is_strong(version: Any) -> bool:
    """A web server's weak ETag may stay when bytes change (RFC 9110, 8.8.3)."""
    return isinstance(version, str | int) and bool(version) and not str(version).startswith("W/")


class Hashes:
    """SHA-256 of files by path and stamp, in a file that processes and machines share."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loaded: tuple[Any, dict[str, list[str]]] = None, {}

    def versions(
        self, fs: AbstractFileSystem, paths: list[str], *, listed: Listing | None = None, anew: bool = False
    ) -> dict[str, str]:
        """A string per file that changes when its bytes do: what the store calls its version, or its SHA-256.

        Args:
            fs: opens the files.
            paths: the files.
            listed: what a listing of a moment ago tells of them.
            anew: read every file whose store knows no version, whatever its stamp.

        Raises:
            SourceError: a file is gone, cannot be read, or changed meanwhile.
        """
        stamps = {path: stamp(fs, path, listed=(listed or {}).get(path)) for path in paths}
        versions = {path: f"version {known.text}" for path, known in stamps.items() if known.is_version}
        left = [path for path in paths if path not in versions]
        if not anew:
            left = self._recall(left, stamps, into=versions)
        if left:
            with self._alone():  # of many processes that want the same, the first one reads
                if not anew:
                    left = self._recall(left, stamps, into=versions)
                if left:
                    versions |= self._read(fs, left, stamps)
        return {path: versions[path] for path in paths}

    def sha256(self, fs: AbstractFileSystem, paths: list[str], *, anew: bool = False) -> dict[str, str]:
        """SHA-256 of files, whether or not their store knows versions of them; local ones are remembered."""
        if "local" in fs.protocol:
            return {p: v.removeprefix("sha256 ") for p, v in self.versions(fs, paths, anew=anew).items()}
        return {path: _sha256(fs, path) for path in paths}

    def _recall(self, paths: list[str], stamps: dict[str, Stamp], *, into: dict[str, str]) -> list[str]:
        known = self._load()
        for path in paths:
            text, sha256 = known.get(path, ("", ""))
            if text == stamps[path].text:
                into[path] = f"sha256 {sha256}"
        return [path for path in paths if path not in into]

    def _read(self, fs: AbstractFileSystem, paths: list[str], stamps: dict[str, Stamp]) -> dict[str, str]:
        def read(path: str) -> str:
            sha256 = _sha256(fs, path)
            if stamp(fs, path).text != stamps[path].text:
                raise SourceError(f"{path} changed while it was read; run again when nobody writes to it")
            return sha256

        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        pool = ThreadPoolExecutor(
            threads if "local" in fs.protocol else 1
        )  # several threads may not share a store's client
        try:
            digests = dict(zip(paths, pool.map(read, paths), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
        kept = {path: [stamps[path].text, sha256] for path, sha256 in digests.items() if not stamps[path].is_young}
        scratch.write_json(self._path, {**self._load(), **kept})
        return {path: f"sha256 {sha256}" for path, sha256 in digests.items()}

    def _load(self) -> dict[str, list[str]]:
        try:
            status = self._path.stat()
            if self._loaded[0] != (key := (status.st_ino, status.st_mtime_ns)):
                self._loaded = key, json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return self._loaded[1]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def open_sequential(fs: AbstractFileSystem, path: str) -> IO[bytes]:
    """Open a file that is read once from its start, which a web server serves without knowing byte ranges."""
    file: IO[bytes] = fs.open(path, "rb", **({"block_size": 0} if "http" in fs.protocol else {}))
    return file


def _sha256(fs: AbstractFileSystem, path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open_sequential(fs, path) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except SourceError:
        raise
    except Exception as error:  # every store and archive has errors of its own
        raise SourceError(f"{path}: reading failed ({type(error).__name__}: {error})") from error
    return digest.hexdigest()
