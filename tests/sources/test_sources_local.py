"""What a folder may hold besides files, what a chained URL names, and that a file is hashed once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import sources
from tasks.sources import SourceError, hashes
from tests.archives import pack

ROOT = Path(__file__).parent.parent.parent


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two files beside one that is no part of it."""
    (tmp_path / "texts/deep").mkdir(parents=True)
    (tmp_path / "texts/a.txt").write_bytes(b"one")
    (tmp_path / "texts/deep/b.txt").write_bytes(b"two")
    (tmp_path / "secret").write_bytes(b"not a text")
    return tmp_path / "texts"


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "deep/x.txt")


def unix_socket(folder: Path) -> None:
    with contextlib.chdir(folder):  # a socket's address is short
        socket.socket(socket.AF_UNIX).bind("x.txt")


def not_utf8(folder: Path) -> None:
    (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt"))).write_text("x")


def link(target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "deep/x.txt").symlink_to(target)


def mutual(folder: Path) -> None:
    (folder / "x.txt").symlink_to("y.txt")
    (folder / "y.txt").symlink_to("x.txt")


ODD: list[tuple[str, Callable[[Path], None], str]] = [
    ("fifo", fifo, r"deep/x.txt is a FIFO, no regular file; remove it"),
    ("socket", unix_socket, r"x.txt is a socket"),
    ("device", link("/dev/zero"), r"deep/x.txt is a link to '/dev/zero', which is outside of the source's folder"),
    ("link out", link("../../secret"), r"deep/x.txt is a link to '../../secret', which is outside"),
    ("absolute link", link("/etc/passwd"), r"deep/x.txt is a link to '/etc/passwd', which is outside"),
    ("folder out", link("../.."), r"deep/x.txt is a link to '../..', which is outside"),
    ("link to a parent", link(".."), r"deep/x.txt is a link to '..', a folder, which would be read twice or without"),
    ("link to itself", link("x.txt"), r"deep/x.txt is a link to 'x.txt', which cannot be followed \(Too many levels"),
    ("links to each other", mutual, r"x.txt is a link to 'y.txt', which cannot be followed \(Too many levels"),
    ("dangling", link("no.txt"), r"deep/x.txt is a link to 'no.txt', which cannot be followed \(No such"),
    ("name", not_utf8, r"the file name b'.*caf\\xe9.txt' is not UTF-8"),
]


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in ODD], ids=[case[0] for case in ODD])
@pytest.mark.parametrize("glob", ["", "/**", "/**/*.txt"], ids=["folder", "all", "pattern"])
def test_what_is_no_file_of_the_folder_is_refused_by_name(
    folder: Path, tmp_path: Path, make: Callable[[Path], None], message: str, glob: str
) -> None:
    make(folder)
    for text in (f"dir:{folder}{glob}", f"file://{folder}{glob}"):
        with pytest.raises(SourceError, match=message) as error:
            sources.fingerprint(text, tmp_path / "cache")
        assert str(error.value).startswith(f"source {text!r}: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [case[1] for case in ODD], ids=[case[0] for case in ODD])
def test_a_glob_that_leaves_it_out_reads_the_others(
    folder: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(folder)
    result = sources.fetch(f"dir:{folder}/**/[ab].txt", tmp_path / "cache")
    assert [result.name_of(path) for path in result.paths] == ["a.txt", "deep/b.txt"]


def test_a_link_inside_the_folder_is_the_file_it_leads_to_and_the_source_itself_may_be_one(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "again.txt").symlink_to("deep/b.txt")
    (tmp_path / "link").symlink_to(folder)
    for text in (f"dir:{tmp_path}/link", f"dir:{tmp_path}/link/*.txt", f"dir:{folder}/../link/**"):
        result = sources.fetch(text, tmp_path / "cache")
        assert result.fs.cat(next(path for path in result.paths if path.endswith("again.txt"))) == b"two"
    (tmp_path / "file").symlink_to(folder / "a.txt")
    assert sources.fetch(f"dir:{tmp_path}/file", tmp_path / "cache").digest() == sha(b"one")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/tty", "{}/pipe"])
def test_a_source_that_is_no_file_is_refused(tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for kind in ("dir:", "file://"):
        with pytest.raises(SourceError, match=r"is a (device|FIFO), no regular file|matches no file"):
            sources.fingerprint(kind + path.format(tmp_path), tmp_path / "cache")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        (Path(name) / "texts/deep").mkdir(parents=True)
        (Path(name) / "texts/deep/b.txt").write_bytes(b"two")
        yield Path(name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("deep/b.txt", r"b.txt: reading failed \(PermissionError"),
        ("deep", "deep cannot be listed \\(Permission denied"),
    ],
)
def test_files_and_folders_that_may_not_be_read_are_named(open_folder: Path, path: str, message: str) -> None:
    (open_folder / "texts" / path).chmod(0)
    user = os.geteuid()
    if not user:
        os.seteuid(65534)  # permissions do not bind root
    try:
        with pytest.raises(SourceError, match=message):
            sources.fingerprint(f"dir:{open_folder}/texts", open_folder / "cache")
    finally:
        os.seteuid(user)
        (open_folder / "texts" / path).chmod(0o755)


def test_a_file_that_vanishes_after_the_listing_is_named(folder: Path, tmp_path: Path) -> None:
    result = sources.fetch(f"dir:{folder}", tmp_path / "cache")
    (folder / "a.txt").unlink()
    for ask in (result.digest, result.versions, result.stamps):
        with pytest.raises(SourceError, match=r"a.txt cannot be read \(No such file or directory\)"):
            ask()


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz"])
def test_an_archive_has_one_fingerprint_in_every_process_which_follows_its_bytes(tmp_path: Path, ending: str) -> None:
    kind = ending.partition(".")[0]
    path = pack(tmp_path / f"a.{ending}", {"x/one.jsonl": b"{}", "x/two.jsonl": b"[]", "other": b""})
    text = f"{kind}://x/one.jsonl::file://{path}"
    code = f"from tasks import sources; print(sources.fingerprint({text!r}, sources.Path({str(tmp_path)!r})))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == sources.fingerprint(text, tmp_path)
    assert sources.fingerprint(f"{kind}://x/one.jsonl::{path}", tmp_path).partition("#")[2] in told.stdout
    fetched = sources.fetch(f"{kind}://x/*.jsonl::file://{path}", tmp_path)
    assert [fetched.name_of(each) for each in fetched.paths] == ["x/one.jsonl", "x/two.jsonl"]
    assert [fetched.fs.cat(each) for each in fetched.paths] == [b"{}", b"[]"]
    pinned = fetched.digest()
    assert sources.fetch(fetched.source.text, tmp_path, sha256=pinned).checked
    before = sources.fingerprint(text, tmp_path)
    old = path.stat()
    pack(path, {"x/one.jsonl": b"[]", "x/two.jsonl": b"[]", "other": b""})
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert sources.fingerprint(text, tmp_path) != before
    with pytest.raises(SourceError, match="sha256 is"):
        sources.fetch(fetched.source.text, tmp_path, sha256=pinned)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip://a.jsonl", r"names no archive; write zip://a.jsonl::ADDRESS"),
        ("zip://a.jsonl::file://{}/none.zip", r"none.zip cannot be read \(No such file"),
        ("tar://a.jsonl::{}/pipe", r"pipe is a FIFO"),
        ("zip://a.jsonl::{}/text", r"cannot be opened: BadZipFile"),
        ("tar://a.jsonl::{}/text", r"cannot be opened: ReadError"),
        ("zip://none.jsonl::{}/a.zip", r"matches no file|FileNotFoundError"),
        ("zip://*.txt::{}/a.zip", r"matches no file"),
    ],
)
def test_an_archive_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("no archive\n" * 100)
    pack(tmp_path / "a.zip", {"a.jsonl": b""})
    with pytest.raises(SourceError, match=message) as error:
        sources.fingerprint(text.format(tmp_path), tmp_path)
    assert "\n" not in str(error.value)


def test_a_store_that_knows_no_versions_is_hashed(tmp_path: Path) -> None:
    """fsspec's own key of this store is the time at which a process wrote the file."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/corpus/a.txt", b"one")
    before = sources.fingerprint("memory://corpus/*.txt", tmp_path)
    fs.pipe("/corpus/a.txt", b"one")
    assert sources.fingerprint("memory://corpus/*.txt", tmp_path, anew=True) == before
    fs.pipe("/corpus/a.txt", b"two")
    assert sources.fingerprint("memory://corpus/*.txt", tmp_path, anew=True) != before
    fs.rm("/corpus", recursive=True)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    names: list[str] = []
    sha256 = hashes._sha256
    monkeypatch.setattr(hashes, "_sha256", lambda fs, path: names.append(Path(path).name) or sha256(fs, path))
    return names


def test_a_file_is_hashed_once_and_again_if_it_was_touched(
    folder: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_YOUNG", -1.0)
    text = f"dir:{folder}"
    before = sources.fingerprint(text, tmp_path)
    assert sorted(read) == ["a.txt", "b.txt"]
    assert sources.fingerprint(text, tmp_path) == before
    assert sources.fetch(text, tmp_path, sha256=before.partition("#")[2]).checked
    assert len(read) == 2
    assert sources.fingerprint(text, tmp_path, anew=True) == before
    assert len(read) == 4
    old = (folder / "a.txt").stat()
    (folder / "a.txt").write_bytes(b"two")
    os.utime(folder / "a.txt", ns=(old.st_atime_ns, old.st_mtime_ns))  # same size and time of modification
    assert sources.fingerprint(text, tmp_path) != before
    assert read[4:] == ["a.txt"]


def test_a_file_so_young_that_its_times_may_come_again_is_not_taken_at_its_stamp(
    folder: Path, tmp_path: Path, read: list[str]
) -> None:
    for _ in range(2):
        sources.fingerprint(f"dir:{folder}", tmp_path)
    assert len(read) == 4


def test_what_was_checked_and_changes_before_or_while_it_is_read_is_refused(folder: Path, tmp_path: Path) -> None:
    text = f"dir:{folder}/a.txt"
    result = sources.fetch(text, tmp_path, sha256=sha(b"one"))
    with result.unchanged():
        pass

    def rewrite(content: bytes) -> None:
        old = (folder / "a.txt").stat()
        (folder / "a.txt").write_bytes(content)
        os.utime(folder / "a.txt", ns=(old.st_atime_ns, old.st_mtime_ns))

    with pytest.raises(SourceError, match=r"a.txt changed while it was read"), result.unchanged():
        rewrite(b"two")
    with pytest.raises(SourceError, match=r"a.txt changed since it was checked"), result.unchanged():
        raise AssertionError("never read")
    now = sources.fetch(text, tmp_path, sha256=sha(b"two"))

    def there_and_back() -> None:  # it is as it was, but who knows what was read
        rewrite(b"one")
        rewrite(b"two")

    with pytest.raises(SourceError, match=r"a.txt changed while it was read"), now.unchanged():
        there_and_back()


def test_many_files_of_a_store_are_listed_and_not_asked_for_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store whose listings have ETags, and more to tell when it is asked for one file, as S3 has."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    asked: list[str] = []

    class Bucket(MemoryFileSystem):
        protocol = "bucket"
        store: dict[str, Any] = {}  # noqa: RUF012

        def _etag(self, path: str) -> str:
            return hashlib.md5(self.store[path].getvalue()).hexdigest()

        def find(self, path: str, **options: Any) -> Any:
            asked.append("list")
            return {p: {"name": p, "type": "file", "size": 3, "ETag": self._etag(p)} for p in sorted(self.store)}

        def info(self, path: str, **options: Any) -> Any:
            path = self._strip_protocol(path)
            if path not in self.store:
                return super().info(path, **options)
            asked.append("info")
            return {"name": path, "type": "file", "size": 3, "ETag": self._etag(path), "VersionId": "7"}

    fsspec.register_implementation("bucket", Bucket, clobber=True)
    fs = fsspec.filesystem("bucket")
    for i in range(40):
        fs.pipe(f"/a/{i:02}.txt", b"one")
    asked.clear()
    result = sources.fetch("bucket://a", tmp_path)
    before, print_ = result.versions(), result.fingerprint()
    assert set(asked) == {"list"}
    assert result.only(result.paths[:2]).versions() == {path: before[path] for path in result.paths[:2]}
    assert asked[-2:] == ["info", "info"]
    fs.pipe("/a/07.txt", b"two")
    assert result.fingerprint() != print_
    with pytest.raises(SourceError, match=r"/a/07.txt changed since it was checked"), result.unchanged(before):
        raise AssertionError("never read")
