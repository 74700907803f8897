"""A source that changes between its check and its reading is never published under the fingerprint of its check."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import scratch, sources
from tasks.corpus import fingerprint, manifest
from tasks.corpus.prepare import chunk_store, resolve, scan, stage
from tasks.sources import hashes
from tests.archives import pack
from tests.corpus.readers.reading import lines
from tests.corpus.texts import CORPUS, ROOT, Project, jsonl, run, sentences
from tests.servers import Ranges, serving

REFRESH = r"; `moeforge run PIPELINE --refresh` takes it as it is now"


def rewrite(path: Path) -> None:
    """Other bytes, with the size and the time of modification that the file had."""
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content.replace(b"the ", b"The ") if b"the " in content else content.replace(b"The ", b"the "))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.read_bytes() != content


def fingerprints() -> None:
    sys.argv = ["fingerprint", "tiny"]
    assert fingerprint.main() == 0


@pytest.fixture
def two(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A domain of two files, each a task of several chunks, and its fingerprint; the folder of the files."""
    monkeypatch.setattr(chunk_store, "CHUNK_RECORDS", 30)
    (tmp_path / "texts").mkdir()
    sizes = []
    for i, name in enumerate("ab"):
        jsonl(path := tmp_path / f"texts/{name}.jsonl", sentences(100, seed=i))
        sizes.append(path.stat().st_size)
    project({"prose": {"source": f"dir:{tmp_path}/texts"}}, task_bytes=max(sizes))
    fingerprints()
    return tmp_path / "texts"


def at_document(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Have `act` called when the scan has seen so many documents."""
    left = number
    doc_id = scan.doc_id

    def counted(text: str) -> bytes:
        nonlocal left
        left -= 1
        if not left:
            act()
        return doc_id(text)

    monkeypatch.setattr(scan, "doc_id", counted)


def refused(message: str) -> None:
    with pytest.raises(sources.SourceError, match=message):
        stage.make("tiny", run=stage.processes(1))
    assert not CORPUS.exists()


@pytest.mark.parametrize("document", [1, 100])
def test_a_file_that_changes_while_it_is_read_is_refused_by_name(
    two: Path, monkeypatch: pytest.MonkeyPatch, document: int
) -> None:
    at_document(monkeypatch, document, lambda: rewrite(two / "a.jsonl"))
    refused(rf"^domain prose: source 'dir:{two}': a.jsonl changed while it was read{REFRESH}")
    assert not list(Path(".scratch").glob("corpus-tiny/*/scan/prose-*/00000*"))
    refused(r"sources changed since they were fingerprinted \(domain prose\)")


def test_a_file_that_changes_and_changes_back_while_it_is_read_is_read_again(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def there_and_back() -> None:
        rewrite(two / "a.jsonl")
        rewrite(two / "a.jsonl")

    at_document(monkeypatch, 50, there_and_back)
    refused(r"a.jsonl changed while it was read")
    stage.make("tiny", run=stage.processes(1))
    continued = scratch.digest(CORPUS)
    run()
    assert scratch.digest(CORPUS) == continued


def test_a_file_that_changes_before_its_task_begins_is_refused(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_document(monkeypatch, 50, lambda: rewrite(two / "b.jsonl"))
    refused(rf"^domain prose: .*b.jsonl changed since it was checked{REFRESH}")


@pytest.mark.parametrize("change", ["rewrite", "delete", "add", "fifo", "replace"])
def test_what_changes_between_scan_and_resolve_is_refused(two: Path, change: str) -> None:
    stage.run_share("tiny", phase="scan", index=0, count=1)
    with stage._workspace("tiny") as todo:
        unit = stage.Unit(phase="resolve", domain="", task=0)
        if change == "rewrite":
            rewrite(two / "b.jsonl")
        elif change == "add":
            jsonl(two / "c.jsonl", ["new"])
        elif change == "replace":
            (two / "c").write_bytes((two / "b.jsonl").read_bytes()[:-2] + b" \n")
            (two / "c").replace(two / "b.jsonl")
        else:
            (two / "b.jsonl").unlink()
            if change == "fifo":
                os.mkfifo(two / "b.jsonl")
        message = {"add": "c.jsonl changed", "fifo": "b.jsonl is a FIFO", "delete": "b.jsonl is gone"}
        with pytest.raises(sources.SourceError, match=rf"^domain prose: .*{message.get(change, 'b.jsonl changed')}"):
            stage.run_unit(str(todo.path), unit)
        assert not resolve.result_file(todo).exists()


def test_chunks_of_a_file_that_was_touched_after_a_kill_are_read_again(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_document(patch, 70, end)
        with pytest.raises(KeyboardInterrupt):
            stage.make("tiny", run=stage.processes(1))
    (folder,) = Path(".scratch").glob("corpus-tiny/*/scan/prose-*")
    assert len(chunk_store.chunk_summaries(folder, 0)) == 2
    rewrite(two / "a.jsonl")
    rewrite(two / "a.jsonl")
    seen: list[str] = []
    doc_id = scan.doc_id
    monkeypatch.setattr(scan, "doc_id", lambda text: seen.append(text) or doc_id(text))
    stage.make("tiny", run=stage.processes(1))
    assert len(seen) == 200
    assert manifest.load(CORPUS).domains["prose"].rules["kept"] == 200


def test_items_and_pins_are_held_to_as_well(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", sentences(60, seed=1))
    items = jsonl(tmp_path / "quiz.jsonl", ["the " * 20])
    pinned = sources.fetch(source, tmp_path / "cache").digest()
    knobs = {"decontaminate": {"items": [{"name": "quiz", "source": items}]}, "task_bytes": 3000}
    project({"prose": {"source": source, "sha256": pinned}}, **knobs)
    fingerprints()
    at_document(monkeypatch, 20, lambda: rewrite(tmp_path / "quiz.jsonl"))
    refused(rf"^items quiz: .*quiz.jsonl changed since it was checked{REFRESH}")
    fingerprints()
    at_document(monkeypatch, 20, lambda: rewrite(tmp_path / "a.jsonl"))
    fix = "bring back the bytes that `sha256` pins, or correct it"
    refused(rf"^domain prose: .*a.jsonl changed while it was read; {fix}")
    refused(r"^domain prose: .*a.jsonl changed since it was checked; bring back the bytes")
    rewrite(tmp_path / "a.jsonl")
    stage.make("tiny", run=stage.processes(1))


def test_a_package_s_archive_that_is_replaced_while_it_is_read_is_refused(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project({"prose": {"source": "pypi:pkg==1.0/pkg/a.jsonl"}})
    path = Path(".scratch/sources/pypi-pkg-1.0/pkg-1.0-py3-none-any.whl")
    pack(path, {"pkg/a.jsonl": lines(sentences(60, seed=1))})
    fingerprints()
    at_document(monkeypatch, 20, lambda: pack(path, {"pkg/a.jsonl": lines(sentences(60, seed=2))}))
    refused(r"^domain prose: .*pkg-1.0-py3-none-any.whl changed while it was read; delete the package's folder")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server without ETags; its files are those of `www`."""
    with serving(tmp_path / "www", Ranges) as address:
        yield address


@pytest.mark.parametrize("pinned", [False, True])
def test_a_url_of_a_server_that_names_no_versions_is_hashed_again_after_the_scan(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, pinned: bool
) -> None:
    jsonl(tmp_path / "www/a.jsonl", sentences(60, seed=1))
    domain: dict[str, Any] = {"source": f"{server}/a.jsonl"}
    if pinned:
        domain["sha256"] = sources.fetch(domain["source"], tmp_path / "cache").digest()
    project({"prose": domain})
    fingerprints()
    at_document(monkeypatch, 20, lambda: rewrite(tmp_path / "www/a.jsonl"))
    refused(r"^domain prose: .*a.jsonl changed since it was checked; ")


def test_an_archive_by_a_chained_url_becomes_a_corpus(project: Project, tmp_path: Path, server: str) -> None:
    pack(tmp_path / "www/a.zip", {f"x/{i}.jsonl": lines(sentences(60, seed=i)) for i in range(2)})
    project({"prose": {"source": f"zip://x/*.jsonl::{server}/a.zip"}})
    done = subprocess.run(
        [sys.executable, "-m", "tasks.corpus.fingerprint", "tiny"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stage.make("tiny", run=stage.processes(1))  # another process than the fingerprint's
    assert manifest.load(CORPUS).domains["prose"].rules["kept"] == 120


def test_members_of_an_array_hash_nothing_that_is_hashed(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_YOUNG", -1.0)
    fingerprints()
    read: list[str] = []
    sha256 = hashes._sha256
    monkeypatch.setattr(hashes, "_sha256", lambda fs, path: read.append(Path(path).name) or sha256(fs, path))
    for member in range(8):
        stage.run_share("tiny", phase="scan", index=member, count=8)
    assert read == []
    stage.run_share("tiny", phase="resolve", index=0, count=1)
    assert sorted(read) == ["a.jsonl", "b.jsonl"]  # the last check
    for member in range(8):
        stage.run_share("tiny", phase="tokenise", index=member, count=8)
    stage.make("tiny", run=stage.processes(1))
    assert len(read) == 2
