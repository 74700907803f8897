"""The display of a corpus at work: plain lines, and on a terminal."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from tasks import display
from tasks.corpus.prepare import corpus_display
from tasks.corpus.prepare.corpus_display import CorpusDisplay
from tasks.corpus.prepare.counters import Meter
from tests.terminals import Terminal


def meter(folder: Path, *, task: int = 0) -> Meter:
    return Meter(folder, phase="scan", domain="code", task=task)


def test_without_a_terminal_there_are_plain_lines_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(corpus_display.time, "monotonic", lambda: now)
    monkeypatch.setattr(corpus_display, "POLL", 1e9)  # the thread sleeps; the test looks
    with CorpusDisplay(tmp_path, domains=["code", "books"]) as shown:
        shown.phase("scan", 4)
        counting = meter(tmp_path)
        for second in range(1, 26):
            now = float(second)
            counting.add(documents=50, bytes=2_000_000)
            counting.rules["empty"] += 1
            if second == 12:
                counting.close()
                counting = meter(tmp_path, task=1)
            shown.look()
        shown.say("code: bad: torn")
        shown.phase("tokenise", 3)
    assert capsys.readouterr().err.splitlines() == [
        "scan: 4 units",
        "scan: 0 of 4 units",
        "  code: 0 files, 500 documents, 0 tokens, 2.0 MB/s; dropped empty 1.8%",
        "scan: 1 of 4 units, 1:00 left",
        "  code: 0 files, 1,000 documents, 0 tokens, 2.0 MB/s; dropped empty 1.9%",
        "code: bad: torn",
        "tokenise: 3 units",
        "code: 0 files, 1,250 documents, 0 tokens, 2.0 MB/s; dropped empty 1.9%",
    ]


def test_units_of_an_earlier_run_are_named_and_give_no_time_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display.Display, "due", lambda _: True)
    monkeypatch.setattr(corpus_display, "POLL", 1e9)
    meter(tmp_path, task=0).close()
    with CorpusDisplay(tmp_path, domains=["code"]) as shown:
        shown.phase("scan", 2, before=1)
        shown.look()
    assert capsys.readouterr().err.splitlines()[:2] == ["scan: 2 units, 1 of them done before", "scan: 1 of 2 units"]


def test_a_display_whose_stderr_is_closed_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "stderr").open("w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with CorpusDisplay(tmp_path / "meters", domains=["code"]) as shown:
            stderr.close()
            monkeypatch.setattr(sys, "stderr", stderr)
            shown.phase("scan", 1)
            meter(tmp_path / "meters").close()
            shown.say("text")
            shown.look()


def test_the_thread_looks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_display, "POLL", 0.001)
    with CorpusDisplay(tmp_path, domains=["code"]) as shown:
        meter(tmp_path).close()
        for _ in range(10_000):
            if shown.counters.finished("scan"):
                return
            time.sleep(0.001)
    pytest.fail("the thread saw nothing")


def test_on_a_terminal_there_is_a_live_table_which_goes_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal.open(monkeypatch)
    monkeypatch.setattr(sys, "stderr", terminal)
    with CorpusDisplay(tmp_path, domains=["code", "books"]) as shown:
        shown.phase("scan", 2)
        with meter(tmp_path) as counting:
            counting.add(1, documents=200, bytes=5)
            counting.rules["length.too_short"] += 3
            counting.rules["gopher_repetition.duplicated_5_n_grams"] += 2
            counting.rules["gopher_repetition.duplicated_6_n_grams"] += 1
        shown.say("[code] bad: torn.jsonl, row 3")
        shown.look()
        deadline = time.monotonic() + 20
        while "1/2 units" not in terminal.getvalue():  # a thread draws
            assert time.monotonic() < deadline
        live = terminal.screen()
    assert live[0] == "[code] bad: torn.jsonl, row 3"
    assert re.search(r"code +1 +200 +0 .*length.too_short 1.5%, gopher.*…", live[2]), (
        "long rules leave the counts whole"
    )
    end = terminal.screen(columns=200)
    assert end[0] == live[0]
    assert end[1].startswith("code: 1 files, 200 documents, 0 tokens")
