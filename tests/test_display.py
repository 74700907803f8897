"""The display that all stages share, on terminals and elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

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
    with Display(lambda: "step 3", stream=terminal) as shown:
        shown.say("an event [in] brackets")
        print("a library's line")
        print("a warning", file=sys.stderr)
    assert terminal.screen() == ["an event [in] brackets", "a library's line", "a warning", "step 3", ""]


def test_a_display_on_stderr_leaves_stdout_where_it_is(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with Display(lambda: "scan", stream=terminal, transient=True):
        print("the corpus")
    assert capsys.readouterr().out == "the corpus\n"
    assert terminal.screen() == [""]


def test_the_cursor_is_shown_while_the_display_is_live_so_that_a_kill_leaves_it(terminal: Terminal) -> None:
    with Display(lambda: "scan", stream=terminal):
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
    assert lines[0].startswith("partition ██████░░░░░░░░░░░░░░░░░░ layer 1/4, error 1e-7, 0:0")
    assert lines[-2] == "OSError: no space left"
    os.close(main)
    os.close(child)


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_dumb_terminal_and_a_file_get_plain_lines(
    term: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", term)
    with Display(lambda: "never drawn", stream=terminal if term == "dumb" else sys.stderr) as shown:
        shown.say("[one] line")
    assert (terminal.getvalue() if term == "dumb" else capsys.readouterr().err) == "[one] line\n"


def test_a_stream_that_is_closed_does_not_end_the_run(terminal: Terminal) -> None:
    for stream in (terminal, (plain := os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))):
        with Display(lambda: "text", stream=stream) as shown:
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
        "partition: layer 3/8, error 1e-7, 0:20 left",
        "partition: layer 6/8, error 1e-7, 0:08 left",
        "partition: layer 8/8, error 1e-7",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.2, "1:00"), (3599.5, "1:00:00"), (90061, "25:01:01")])
def test_a_clock_counts_up_to_whole_seconds(seconds: float, text: str) -> None:
    assert display.clock(seconds) == text
