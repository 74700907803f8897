"""The text of a source: what it may say, and whether it alone fixes the bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SYNTAX = "hub:ORG/NAME@REVISION, pypi:NAME==VERSION/PATH, npm:NAME==VERSION/PATH, dir:PATH or an fsspec URL"
_PACKAGE = re.compile(r"(?P<name>(?:@\w[\w.-]*/)?\w[\w.-]*)==(?P<version>[^/\s]+)/(?P<path>.+)")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<version>[\w.-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SEMVER = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){2}(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?(\+[0-9A-Za-z.-]+)?")
_GLOB = re.compile(r"[*?\[]")


class SourceError(ValueError):
    """A source that cannot be parsed, fetched or trusted; the message names it and the fix."""


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


def parse(text: str) -> Source:
    """Parse a source. Raises SourceError naming the text and the syntax, or the version that is a range or a tag."""
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
    source = Source(text=text, kind=kind, name=parts["name"], version=parts["version"], path=parts.get("path") or "")
    if kind != "hub":
        _require_release(source)
    return source


def require_commit(source: Source) -> None:
    """Raise SourceError unless a dataset of the hub is pinned to a commit: branches and tags can move."""
    if not source.is_pinned:
        raise SourceError(
            f"source {source.text!r}: {source.version!r} can move; write the commit it stands for, 40 hex digits "
            f"(`git ls-remote https://huggingface.co/datasets/{source.name} {source.version}` prints it)"
        )


def _require_release(source: Source) -> None:
    """Raise SourceError unless the version is one release: pip and npm also take ranges and tags, which move."""
    if source.kind == "npm":
        is_exact, listing = bool(_SEMVER.fullmatch(source.version)), f"npm view {source.name} versions"
    else:
        from packaging.version import InvalidVersion, Version

        listing = f"pip index versions {source.name}"
        try:
            is_exact = bool(Version(source.version))
        except InvalidVersion:
            is_exact = False
    if not is_exact:
        raise SourceError(
            f"source {source.text!r}: {source.version!r} is no exact version, so what it names can change; write one "
            f"release, as in {source.name}==1.2.3 (`{listing}` lists them)"
        )
