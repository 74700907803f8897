from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import scratch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_work_is_found_again_for_the_same_inputs_and_deleted_for_others() -> None:
    with scratch.workspace("corpus", "demo", inputs={"a": 1, "b": [2]}) as first:
        (first / "half").write_text("done")
    with scratch.workspace("corpus", "demo", inputs={"b": [2], "a": 1}) as again:
        assert (again / "half").read_text() == "done"
    with scratch.workspace("corpus", "demo", inputs={"a": 2}) as other:
        assert not list(other.iterdir())
        assert not first.exists()
    with scratch.workspace("corpus", "other", inputs={"a": 1}) as apart:
        assert apart.parent != other.parent
        assert other.exists()


def test_expensive_work_is_kept_for_its_inputs_one_folder_at_most_until_other_work_is_finished() -> None:
    def work(inputs: str) -> Any:
        return scratch.workspace("corpus", "demo", inputs=inputs, priority=scratch.last_used)

    folders = {}
    for moment, inputs in enumerate("abc"):
        with work(inputs) as folders[inputs]:
            (folders[inputs] / "half").write_text(inputs)
        os.utime(folders[inputs], (moment, moment))
    assert [folders[inputs].exists() for inputs in "abc"] == [False, True, True]
    (folders["c"].parent / "done-0123").mkdir()  # what a kill left of a finished one
    with work("b") as again:
        assert (again / "half").read_text() == "b"
        assert scratch.others(again) == [folders["c"]]
        shutil.rmtree(again)
    assert not scratch.others(again)


HOLD = """
import sys, time
from tasks import scratch
with scratch.workspace("pretrain", "demo"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_by_name_and_kill_9_frees_the_lock() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with (
        pytest.raises(scratch.BusyError, match=f"pretrain demo is already being run by process {process.pid};"),
        scratch.workspace("pretrain", "demo"),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with scratch.workspace("pretrain", "demo") as folder:
        assert folder.exists()


def _folder(path: str, **files: str) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def test_publishing_replaces_a_folder_whole() -> None:
    target = _folder("data/corpora/demo", old="1", both="1")
    scratch.publish(_folder(".scratch/unit/corpus", new="2", both="2"), target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"new": "2", "both": "2"}
    assert [path.name for path in target.parent.iterdir()] == ["demo"]


def test_publishing_replaces_files_and_links_and_never_what_a_link_points_at() -> None:
    cached = _folder("cache/ab", kept="1")
    Path("data").mkdir()
    target = Path("data/demo")
    target.symlink_to(cached.resolve())
    scratch.publish(_folder("work/result", new="2"), target)
    assert (target / "new").read_text() == "2"
    assert not target.is_symlink()
    assert (cached / "kept").read_text() == "1"
    Path("work/file").write_text("3")
    Path("data/file").write_text("old")
    scratch.publish(Path("work/file"), Path("data/file"))
    assert Path("data/file").read_text() == "3"


def test_what_a_publish_killed_midway_set_aside_is_swept_by_the_next() -> None:
    _folder("data/.demo.publishing-0123", big="x")
    _folder("data/.other.publishing-0123", big="x")
    scratch.publish(_folder("work/result", new="2"), Path("data/demo"))
    assert sorted(path.name for path in Path("data").iterdir()) == [".other.publishing-0123", "demo"]


@pytest.fixture
def other_disk() -> Iterator[Path]:
    """A folder on another file system than the tests' own."""
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == Path().stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_publishing_crosses_file_systems(other_disk: Path) -> None:
    Path(".scratch").symlink_to(other_disk)
    result = _folder(".scratch/unit/moe", new="2")
    (result / "inner").mkdir()
    (result / "inner" / "part").write_text("3")
    target = _folder("runs/demo/moe", old="1")
    scratch.publish(result, target)
    scratch.publish(_folder(".scratch/other", one="4") / "one", Path("runs/demo/one.json"))
    assert sorted(str(path.relative_to("runs/demo")) for path in Path("runs/demo").rglob("*")) == [
        "moe", "moe/inner", "moe/inner/part", "moe/new", "one.json",
    ]  # fmt: skip
    assert not result.exists()
    scratch.link(Path("runs/demo/moe/new"), Path(".scratch/linked"))
    assert Path(".scratch/linked").read_text() == "2"


def test_publishing_that_fails_leaves_result_and_target_as_they_were(
    other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, target: str, **_: object) -> None:
        Path(target).write_text("ha")
        raise shutil.Error([(source, target, "[Errno 28] No space left on device")])

    Path(".scratch").symlink_to(other_disk)
    result, target = _folder(".scratch/unit/moe", new="2"), _folder("runs/demo/moe", old="1")
    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(
        OSError, match=r"No space left on device.*; the finished result is in .scratch/unit/moe.*runs/demo"
    ):
        scratch.publish(result, target)
    assert [path.name for path in Path("runs/demo").iterdir()] == ["moe"]
    assert (target / "old").exists()
    assert (result / "new").exists()


def test_digests_follow_names_and_contents() -> None:
    first, second = _folder("a", x="1", y="2"), _folder("b", x="1", y="2")
    assert scratch.digest(first) == scratch.digest(second)
    (second / "y").rename(second / "z")
    assert scratch.digest(first) != scratch.digest(second)
    assert scratch.digest(first / "x") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"


def test_json_is_replaced_whole_or_not_at_all() -> None:
    path = Path("metrics/demo.json")
    scratch.write_json(path, {"b": 1, "a": 2})
    assert path.read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'
    with pytest.raises(TypeError):
        scratch.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 2, "b": 1}
