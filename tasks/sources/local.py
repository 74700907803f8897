"""Local files: what a path or glob names, and nothing that would hang, loop or lead elsewhere when it is read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator

from tasks.sources.syntax import SourceError

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MAGIC = re.compile(r"[*?\[]")


def files(path: str, *, anywhere: bool = False) -> dict[str, int]:
    """The regular files that an absolute path (a file, a folder or a glob) names, and their sizes.

    A link inside the folder counts as the file that it leads to, if that is in the folder too. The path itself, or the
    part of a glob before its first wildcard, may be a link anywhere; so may all links if `anywhere`.

    Raises:
        SourceError: something named cannot be read as a file; says what and why.
    """
    magic = _MAGIC.search(path)
    if magic is None:
        return _plain(path, anywhere=anywhere)
    from fsspec.utils import glob_translate

    root = path[: path.rindex("/", 0, magic.start()) + 1]
    depth = None if "**" in path else path[len(root) :].count("/") + 1
    pattern = re.compile(glob_translate(path))
    if not _exists(root):
        return {}
    named = (entry for entry in _walk(root, depth=depth) if pattern.match(entry.path))
    return dict(_judged(named, root, is_glob=True, anywhere=anywhere))


def regular(path: str) -> os.stat_result:
    """`os.stat` of a file that is read. Raises SourceError if it is gone, or is no regular file any more."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); bring it back, or correct the source") from error
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{path} is {_kind(status.st_mode)}, no regular file; remove it or name the files by a glob")
    return status


def _plain(path: str, *, anywhere: bool) -> dict[str, int]:
    if not _exists(path):
        return {}
    if os.path.isdir(path):
        return dict(_judged(_walk(path, depth=None), path, is_glob=False, anywhere=anywhere))
    return {path: regular(path).st_size}


def _exists(path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise SourceError(f"{path} cannot be opened ({error.strerror}); correct permissions or source") from None
    return True


def _judged(
    entries: Iterator[os.DirEntry[str]], root: str, *, is_glob: bool, anywhere: bool
) -> Iterator[tuple[str, int]]:
    real = "/" if anywhere else os.path.realpath(root)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            continue
        if entry.is_symlink():
            _require_inside(entry.path, real, is_glob=is_glob)
        yield entry.path, regular(entry.path).st_size


def _walk(root: str, *, depth: int | None) -> Iterator[os.DirEntry[str]]:
    """Every entry below a folder, at most `depth` levels down; links to folders are not followed."""
    try:
        with os.scandir(root) as opened:
            entries = sorted(opened, key=lambda entry: entry.name)
    except FileNotFoundError:
        raise SourceError(f"{root} vanished while the source was listed; run again") from None
    except OSError as error:
        raise SourceError(f"{root} cannot be listed ({error.strerror}); correct permissions or source") from None
    for entry in entries:
        yield entry
        if (depth is None or depth > 1) and entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, depth=depth and depth - 1)


def _require_inside(path: str, real_root: str, *, is_glob: bool) -> None:
    fix = "leave it out of the glob" if is_glob else "remove it, or name the files by a glob that leaves it out"
    leads = f"{path} is a link to {os.readlink(path)!r}"
    try:
        real = os.path.realpath(path, strict=True)
    except OSError as error:
        raise SourceError(f"{leads}, which cannot be followed ({error.strerror}); {fix}") from None
    if os.path.commonpath([real, real_root]) != real_root:
        raise SourceError(f"{leads}, which is outside of the source's folder; copy the file to its place, or {fix}")
    if os.path.isdir(real):
        raise SourceError(f"{leads}, a folder, which would be read twice or without end; {fix}")


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")
