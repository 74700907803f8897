"""The display that all stages share, on terminals and elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.progress import TextColumn

from tasks import display
from tasks.display import Display, Progress
from tests.terminals import Terminal, screen

ROOT = Path(__file__).parents[1]
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal.open(monkeypatch)


def test_what_is_said_and_printed_stands_above_the_live_area(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Display(TextColumn("{task.description}"), stream=terminal) as shown:
        shown.bars.add_task("step 3")
        shown.say("an event [in] brackets")
        print("a library's line")
        print("a warning", file=sys.stderr)
    assert terminal.screen() == ["an event [in] brackets", "a library's line", "a warning", "step 3", ""]


def test_a_display_on_stderr_leaves_stdout_where_it_is(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, label="corpus", unit="unit", stream=terminal):
        print("the corpus")
    assert capsys.readouterr().out == "the corpus\n"


def test_the_cursor_is_shown_while_the_display_is_live_so_that_a_kill_leaves_it(terminal: Terminal) -> None:
    with Progress(2, label="scan", unit="unit", stream=terminal):
        deadline = time.monotonic() + 20
        while "scan" not in (written := terminal.getvalue()):  # a thread draws
            assert time.monotonic() < deadline
        assert written.rfind(SHOW) > written.rfind(HIDE)


def test_a_real_terminal_keeps_its_settings_and_its_cursor_after_an_error() -> None:
    main, child = pty.openpty()
    before = termios.tcgetattr(child)
    code = (
        "import sys; from tasks.display import Progress\n"
        "with Progress(4, label='partition', unit='layer', stream=sys.stdout) as progress:\n"
        "    progress.advance('error 1e-7')\n"
        "    raise OSError('no space left')"
    )
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=child, stdout=child, stderr=child, env=env, cwd=ROOT, check=False
    )
    written = os.read(main, 1 << 16).decode()
    assert termios.tcgetattr(child) == before
    assert done.returncode == 1
    assert written.rfind(SHOW) > written.rfind(HIDE)
    lines = screen(written)
    assert re.match(r"partition: layer ━+╺━+ 1/4 error 1e-7 +-:--:--$", lines[0])
    assert lines[-2] == "OSError: no space left"
    os.close(main)
    os.close(child)


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_dumb_terminal_and_a_file_get_plain_lines(
    term: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", term)
    with Display(stream=terminal if term == "dumb" else sys.stderr) as shown:
        shown.say("[one] line")
    assert (terminal.getvalue() if term == "dumb" else capsys.readouterr().err) == "[one] line\n"


def test_a_stream_that_is_closed_does_not_end_the_run(terminal: Terminal) -> None:
    for stream in (terminal, (plain := os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))):
        with Display(stream=stream) as shown:
            stream.close()
            shown.say("lost")
    assert plain.closed


def test_progress_without_a_terminal_is_a_line_now_and_then_and_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    with Progress(8, label="partition", unit="layer") as progress:
        for _ in range(8):
            now += 4
            progress.advance("error 1e-7")
    assert capsys.readouterr().err.splitlines() == [
        "partition: layer 1/8, error 1e-7",
        "partition: layer 4/8, error 1e-7, 0:00:16 left",
        "partition: layer 7/8, error 1e-7, 0:00:04 left",
        "partition: layer 8/8, error 1e-7",
    ]


def test_a_run_that_goes_on_counts_from_where_it_was_and_takes_its_speed_from_its_own_pieces(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    with Progress(8, label="", unit="step", stream=sys.stdout) as progress:
        progress.begin(4)
        for step in (5, 6, 7):
            now += 10
            progress.reach(step, "loss 2.5")
    assert capsys.readouterr().out.splitlines() == [
        "step 5/8, loss 2.5",
        "step 6/8, loss 2.5, 0:00:20 left",
        "step 7/8, loss 2.5, 0:00:10 left",
    ]
