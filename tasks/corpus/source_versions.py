"""Versions of all source files, so that a corpus is read from the bytes that were fingerprinted.

The plan records the version of every file. A task compares the versions of its files before and after it reads them.
After the scan, all files are hashed once more. A changed file ends the run, even if its size and times are the same
(tasks/sources/hashes.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks import settings, sources
from tasks.settings import Domain, Items

Versions = dict[str, dict[str, str]]
"""{"domain NAME" or "items NAME": {file: its version}}"""


def record(corpus: settings.Corpus, cache: Path, *, fingerprints: dict[str, str]) -> Versions:
    """The versions of all files of a corpus. Raises SourceError unless they have the fingerprints."""
    versions = {}
    for name, part in corpus.parts().items():
        source = sources.parse(part.source)
        if source.kind == "hub":  # its commit pins it
            continue
        with naming(name), (fetched := _fetch(part, cache)).unchanged(fix=fix(part)):
            versions[name] = fetched.versions()
            if part.sha256 is None and not source.is_pinned and fetched.fingerprint() != fingerprints[name]:
                raise sources.SourceError(f"source {part.source!r} changed since it was fingerprinted; {fix(part)}")
    return versions


def require_unchanged(corpus: settings.Corpus, cache: Path, *, versions: Versions) -> None:
    """Read all files again. Raises SourceError naming the first that differs from the recorded `versions`."""
    for name, part in corpus.parts().items():
        if (known := versions.get(name)) is None:
            continue
        with naming(name):
            fetched = _fetch(part, cache)
            now = fetched.versions(anew=True)
            fetched.require(known, now, fix=fix(part))
            fetched.require(now, dict.fromkeys(known.keys() - now.keys(), "gone"), what="is gone", fix=fix(part))


def fix(part: Domain | Items) -> str:
    """How to fix a run whose `part` changed."""
    if part.source.startswith(("pypi:", "npm:")):
        return "delete the package's folder in .scratch/sources, and run again"
    if part.sha256:
        return "bring back the bytes that `sha256` pins, or correct it"
    return "`moeforge run PIPELINE --refresh` takes it as it is now"


def _fetch(part: Domain | Items, cache: Path) -> sources.Fetched:
    return sources.fetch(part.source, cache, sdist=getattr(part, "sdist", False))


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Put the name of a part in front of a SourceError."""
    try:
        yield
    except sources.SourceError as error:
        raise sources.SourceError(f"{part}: {error}") from error
