"""Folders, object stores, web servers and archives on them, through fsspec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tasks.sources.local as local
from tasks.sources.hashes import Listing
from tasks.sources.syntax import Source, SourceError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_ARCHIVES = ("zip", "tar", "libarchive")
Place = tuple["AbstractFileSystem", str]


@dataclass(frozen=True, kw_only=True)
class Store:
    """An open source: `listed` are its files; `archive` is the place of the archive that they lie in, if they do.

    `again` lists a store's files anew; None for local files and archives, which are asked one by one.
    """

    fs: AbstractFileSystem
    listed: Listing
    archive: Place | None = None
    again: Callable[[], Listing] | None = None


def open_store(source: Source, *, anywhere: bool = False) -> Store:
    """What a `dir:` source or a URL names; `anywhere`: links of a folder may lead out of it.

    Raises:
        SourceError: it cannot be opened, or a local file of it is none that can be read.
    """
    import fsspec

    try:
        if source.kind == "dir":
            fs = fsspec.filesystem("file")
            return Store(fs=fs, listed=_local(fs, source.path, anywhere=anywhere))
        archive = _archive(source)
        fs, path = fsspec.url_to_fs(source.path, **({"skip_instance_cache": True} if archive else {}))
        if "local" in fs.protocol:
            return Store(fs=fs, listed=_local(fs, path, anywhere=anywhere))

        def again() -> Listing:
            fs.invalidate_cache()
            if source.is_glob:
                return dict(fs.glob(path, detail=True))
            if "http" in fs.protocol:  # listing would download the file and look for links in it
                return {path: fs.info(path)}
            return dict(fs.find(path, detail=True))

        return Store(fs=fs, listed=again(), archive=archive, again=None if archive else again)
    except ImportError as error:
        extra = next((extra for protocol, extra in _EXTRAS.items() if f"{protocol}://" in source.path), None)
        fix = f"pip install 'moeforge[{extra}]'" if extra else "install the package it names"
        raise SourceError(f"source {source.text!r} cannot be opened: {error}; {fix}") from error
    except SourceError as error:
        raise SourceError(f"source {source.text!r}: {error}") from error
    except Exception as error:  # every store and archive has errors of its own; ValueError: no such protocol
        raise SourceError(f"source {source.text!r} cannot be opened: {type(error).__name__}: {error}") from error


def _archive(source: Source) -> Place | None:
    """Where the outermost archive of a chained URL lies, such as that of `zip://a.jsonl::https://host/b.zip`."""
    import fsspec

    if source.path.partition("://")[0] not in _ARCHIVES:
        return None
    _, chained, address = source.path.rpartition("::")
    if not chained:
        raise SourceError(f"names no archive; write {source.path}::ADDRESS, with the archive's file or URL")
    fs, path = fsspec.url_to_fs(address)
    if "local" in fs.protocol:
        local.regular(path)
    return fs, path


def _local(fs: AbstractFileSystem, path: str, *, anywhere: bool) -> Listing:
    path = fs._strip_protocol(path)  # absolute, with ~ expanded
    return {name: {"type": "file", "size": size} for name, size in local.files(path, anywhere=anywhere).items()}
