"""Meters in a shared folder, and the display of them: plain lines, and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.corpus import files
from tasks.corpus.build import progress
from tasks.corpus.build.counters import Counters, Snapshot
from tasks.corpus.build.progress import Display, Meter

ROOT = Path(__file__).parents[3]
WORK = """
import sys
from pathlib import Path
from tasks.corpus.build import progress
progress.POLL = 0.05
with progress.Display(Path(sys.argv[1]), domains=["code", "books"]) as display:
    display.phase("scan", 2)
    meter = progress.Meter(Path(sys.argv[1]), phase="scan", domain="code", task=0)
    meter.add(1, documents=200, bytes=5)
    meter.rules["length.too_short"] += 3
    meter.rules["gopher_repetition.duplicated_5_n_grams"] += 2
    meter.rules["gopher_repetition.duplicated_6_n_grams"] += 1
    meter.close()
    display.say("[code] bad: torn.jsonl, row 3")
    display.phase("tokenise", 2)
print("the corpus")
"""


def snapshot(folder: Path, name: str) -> Snapshot:
    return Snapshot.model_validate_json((folder / name).read_bytes())


def meter(folder: Path, *, phase: str = "scan", domain: str = "code", task: int = 0) -> Meter:
    return Meter(folder, phase=phase, domain=domain, task=task)


def test_a_meter_writes_when_it_begins_once_a_second_and_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen = 0.0, []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    counting = meter(tmp_path, task=7)
    seen.append(snapshot(tmp_path, "scan-code-00007.json").documents)
    for quarter in range(1, 10):
        now = quarter / 4
        counting.add(documents=1)
        seen.append(snapshot(tmp_path, "scan-code-00007.json").documents)
    counting.rules["empty"] += 2
    counting.close()
    assert seen == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    last = snapshot(tmp_path, "scan-code-00007.json")
    assert (last.done, last.documents, last.rules) == (True, 9, {"empty": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["scan-code-00007.json"]


def test_what_a_killed_meter_leaves_is_found_by_a_sweep_and_by_no_display(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            meter(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert Counters(tmp_path, 0.0).sums == {}
    files.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_meter_that_cannot_write_lets_the_work_go_on(tmp_path: Path) -> None:
    counting = meter(tmp_path / "gone")
    for path in (tmp_path / "gone").iterdir():
        path.unlink()
    (tmp_path / "gone").rmdir()
    counting.add(documents=1)
    counting.close()
    assert not (tmp_path / "gone").exists()


def test_a_meter_whose_block_fails_stays_open(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), meter(tmp_path):
        raise KeyboardInterrupt
    assert not snapshot(tmp_path, "scan-code-00000.json").done


def test_without_a_terminal_there_are_plain_lines_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "POLL", 1e9)  # the thread sleeps; the test looks
    with Display(tmp_path, domains=["code", "books"]) as display:
        display.phase("scan", 4)
        counting = meter(tmp_path)
        for second in range(1, 26):
            now = float(second)
            counting.add(documents=50, bytes=2_000_000)
            counting.rules["empty"] += 1
            if second == 12:
                counting.close()
                counting = meter(tmp_path, task=1)
            display.look()
        display.say("code: bad: torn")
        display.phase("tokenise", 3)
    assert capsys.readouterr().err.splitlines() == [
        "scan: 4 units",
        "scan: 0 of 4 units",
        "  code: 0 files, 500 documents, 0 tokens, 2.0 MB/s; dropped empty 1.8%",
        "scan: 1 of 4 units, 0:01:00 to go",
        "  code: 0 files, 1,000 documents, 0 tokens, 2.0 MB/s; dropped empty 1.9%",
        "code: bad: torn",
        "tokenise: 3 units",
        "code: 0 files, 1,250 documents, 0 tokens, 2.0 MB/s; dropped empty 1.9%",
    ]


def test_units_of_an_earlier_run_are_named_and_give_no_time_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "POLL", 1e9)
    meter(tmp_path, task=0).close()
    with Display(tmp_path, domains=["code"]) as display:
        display.phase("scan", 2, before=1)
        display.look()
    assert capsys.readouterr().err.splitlines()[:2] == ["scan: 2 units, 1 of them done before", "scan: 1 of 2 units"]


def test_a_display_whose_stderr_is_closed_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "stderr").open("w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Display(tmp_path / "meters", domains=["code"]) as display:
            stderr.close()
            monkeypatch.setattr(sys, "stderr", stderr)
            display.phase("scan", 1)
            meter(tmp_path / "meters").close()
            display.say("text")
            display.look()


def test_the_thread_looks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL", 0.001)
    with Display(tmp_path, domains=["code"]) as display:
        meter(tmp_path).close()
        for _ in range(10_000):
            if display.counters.finished("scan"):
                return
            time.sleep(0.001)
    pytest.fail("the thread saw nothing")


def test_on_a_terminal_there_is_one_live_display_and_stdout_stays_where_it_is(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=environment,
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            block = os.read(controller, 4096)
        except OSError:  # Linux says EIO when the other end is closed
            break
        if not block:
            break
        output += block
    os.close(controller)
    assert process.communicate()[0] == b"the corpus\n"
    assert process.returncode == 0
    text = output.decode()
    assert "\x1b[?25l" in text  # the cursor is hidden while it is live
    assert "0/2 units" in text
    assert "[code] bad: torn.jsonl, row 3" in text
    assert "length.too_short 1.5%" in text
    live = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert re.search(r"code +1 +200 +0 .*length.too_short 1.5%, gopher.*…", live)  # long rules leave the counts whole
    assert "code: 1 files, 200 documents, 0 tokens" in text.rsplit("\x1b[?25h", 1)[1]
