"""What is shipped is whole at every moment, outlives what it was made from, and can be had back."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import quality_gate, releases

BIG = "w" * (releases._LINKED + 1)


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda number: None)  # a kill loses nothing of it, and a busy disk takes a minute


def result(text: str) -> dict[str, Any]:
    """Let a run leave this result; returns its record."""
    run = Path("runs/toy")
    for part in ("model", "report"):
        shutil.rmtree(run / part, ignore_errors=True)
        (run / part / "inner").mkdir(parents=True)
        (run / part / "inner" / "text").write_text(text)
    (run / "model" / "weights").write_text(text + BIG)
    (run / "evaluation.json").write_text("{}")
    lock = {"stages": {"report@toy": {"outs": [{"path": "runs/toy/model", "md5": f"{text:0<32}.dir"}]}}}
    Path("dvc.lock").write_text(json.dumps(lock))
    return {"trained": 1.0, "dense": 1.0, "parent": None, "domains": {}, "slipped": 0.0}


def read() -> tuple[str, str]:
    """Both files of what is shipped."""
    folder = Path("runs/toy/release").resolve()
    return (folder / "inner" / "text").read_text(), (folder / "weights").read_text().removesuffix(BIG)


def test_a_release_takes_no_second_place_and_outlives_what_it_was_made_from() -> None:
    record = result("1")
    releases.accept("toy", record)
    assert read() == ("1", "1")
    shipped = Path("runs/toy/release/weights")
    assert shipped.samefile("runs/toy/model/weights")
    Path("runs/toy/model/inner/text").write_text("edited in place")
    result("2")
    assert read() == ("1", "1")
    assert json.loads(Path("runs/toy/release/release.json").read_text())["release"] == releases.shipped("toy")


def child(action: Callable[[], object], *, die_at: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run an action in a process that kills itself at its `die_at`th step on the disk; returns how it ended."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    steps = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for owner, name in ((os, "fsync"), (os, "link"), (os, "rename"), (os, "replace"), (os, "symlink"), (os, "unlink"),
                        (os, "mkdir"), (shutil, "copyfile"), (shutil, "rmtree")):  # fmt: skip
        setattr(owner, name, counted(getattr(owner, name)))
    try:
        action()
    finally:
        os._exit(0)


@pytest.mark.parametrize("action", ["accept", "rollback"])
def test_killed_at_any_step_a_whole_release_is_shipped_and_the_next_run_goes_on(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, step = -1, 0
    while ended != 0:
        step += 1
        shutil.rmtree("runs", ignore_errors=True)
        for text in "ab" if action == "rollback" else "a":
            releases.accept("toy", result(text))
        before, after = ("b", "a") if action == "rollback" else ("a", "b")
        record = result("b")
        act: dict[str, Callable[[], object]] = {
            "accept": lambda record=record: releases.accept("toy", record),
            "rollback": lambda: releases.rollback("toy"),
        }
        ended = child(act[action], die_at=step, monkeypatch=monkeypatch)
        assert read() in ((before, before), (after, after))
        releases.settle("toy")
        last = quality_gate.accepted("toy")
        assert last is not None
        assert last["release"] == releases.shipped("toy")  # the record and the link agree
        if read() == (before, before):
            act[action]()
        assert read() == (after, after)
        assert releases.is_decided("toy")
    assert step > 10


def test_refused_results_stay_aside_with_the_decision_and_are_few() -> None:
    releases.accept("toy", result("a"))
    for text in "bcdef":
        record = result(text)
        assert not releases.is_decided("toy")
        folder = releases.refuse("toy", record, "refused: too bad")
        assert releases.is_decided("toy")
        assert (folder / "model/inner/text").read_text() == (folder / "report/inner/text").read_text() == text
        assert json.loads((folder / "refusal.json").read_text())["why"] == "refused: too bad"
    assert len(list(Path("runs/toy/refused").iterdir())) == releases.KEPT
    assert read() == ("a", "a")


def test_releases_go_back_and_forth_and_old_ones_go() -> None:
    with pytest.raises(releases.ReleaseError, match="nothing was released yet; `moeforge release toy`"):
        releases.rollback("toy")
    releases.accept("toy", result("a"))
    with pytest.raises(releases.ReleaseError, match=r"no release before a0+ is kept here; kept besides a0+: none"):
        releases.rollback("toy")
    for text in "bcd":
        releases.accept("toy", result(text))
    assert len([path for path in Path("runs/toy/releases").iterdir() if path.is_dir()]) == releases.KEPT
    ids = releases.rollback("toy")
    assert read() == ("c", "c")
    assert releases.is_decided("toy")  # d is there still, and must not be shipped again by itself
    assert releases.rollback("toy", ids[0]) == ids[::-1]
    assert read() == ("d", "d")
    assert not Path("runs/toy/refused", ids[0]).exists()
    with pytest.raises(releases.ReleaseError, match="no release 'x' is kept here"):
        releases.rollback("toy", "x")


def test_a_clone_that_has_the_record_but_not_the_release_says_how_to_get_it_or_makes_it() -> None:
    record = result("a")
    releases.accept("toy", record)
    shutil.rmtree("runs/toy/releases")
    assert releases.settle("toy") is None
    assert read() == ("a", "a")
    shutil.rmtree("runs/toy/releases")
    result("b")
    problem = releases.settle("toy")
    assert problem is not None
    assert "is not on this machine; `dvc pull report@toy`" in problem
