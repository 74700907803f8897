"""The display on a real pseudo-terminal and elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tasks.pretrain.log import training_display

ROOT = Path(__file__).parents[3]
RUN = """
import sys, time
from tasks.pretrain.log.training_display import TrainingDisplay

def step(number):
    domains = {"books": {"loss": 3.25, "windows": 2, "epochs": 0.125}}
    experts = {"used": 1.0, "entropy": 0.875, "peak": 0.25, "dead": 3, "layers": {}}
    timing = {"seconds": 2.0, "tokens_per_second": 512.0, "mfu": 0.5}
    return {"kind": "step", "step": number, "loss": 1.5, "lr": 1e-3, "domains": domains, "experts": experts,
            "timing": timing}

def validation(number):
    losses = {"books": 3.5, "code[/b]": 1.0}
    weights = {"books": 0.75, "code[/b]": 0.25}
    return {"kind": "validation", "step": number, "mean": 2.25, "losses": losses, "weights": weights}

event = {"kind": "event", "step": 2, "what": "dead_experts", "message": "layer 3: expert 7 had no token [in] steps"}
"""


def on_terminal(code: str, *, columns: int = 100) -> tuple[str, int]:
    """All that a program writes to a terminal of 40 rows, and how it ended."""
    main, child = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    before = termios.tcgetattr(child)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        env.pop(name, None)
    program = [sys.executable, "-c", RUN + textwrap.dedent(code)]
    with subprocess.Popen(program, stdin=child, stdout=child, stderr=child, env=env, cwd=ROOT) as process:
        written = b""
        while process.poll() is None or _waiting(main):
            if _waiting(main):
                written += os.read(main, 65536)
    assert termios.tcgetattr(child) == before, "the terminal's own settings are changed"
    os.close(main)
    os.close(child)
    return written.decode(), process.returncode


def _waiting(main: int) -> bool:
    import select

    return bool(select.select([main], [], [], 0.05)[0])


def screen(written: str, *, rows: int = 40, columns: int = 100) -> list[str]:
    """What a terminal shows in the end: the few sequences that are used here, by hand."""
    lines, row, column = [[" "] * columns for _ in range(rows)], 0, 0
    for token in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[^\x1b]", written):
        if token == "\n":
            row += 1
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b["):
            count = int(token[2:-1] or 1) if token[2:-1].isdigit() or token[2:-1] == "" else 0
            if token[-1] == "A":
                row -= count
            elif token[-1] == "K":
                lines[row] = [" "] * columns
            elif token[-1] not in "mhl":
                raise AssertionError(f"{token!r} is not known to this terminal")
        else:
            lines[row][column] = token
            column += 1
    return ["".join(line).rstrip() for line in lines[: row + 1]]


def test_a_terminal_shows_the_bar_the_domains_and_the_experts_and_above_them_what_happened() -> None:
    written, code = on_terminal("""
        with TrainingDisplay(4) as shown:
            shown.show(validation(0))
            shown.show(step(1))
            time.sleep(1.2)
            shown.show(event)
            shown.show(step(3))
    """)
    assert code == 0, written
    seen = screen(written)
    assert seen[0] == "validation at step 0: mean 2.2500  books 3.5000  code[/b] 1.0000"
    assert seen[1] == "step 2: layer 3: expert 7 had no token [in] steps"
    assert seen[2].split() == ["domain", "weight", "loss", "validation", "epochs"]
    assert seen[3].split() == ["books", "0.750", "3.2500", "3.5000", "0.125"]
    assert seen[4].split() == ["code[/b]", "0.250", "–", "1.0000", "–"]
    assert seen[5] == "experts: entropy 0.875 of 1, busiest 25.0%, 3 without tokens"
    assert re.match(r"█{18}░{6} step 3/4  loss 1\.5000  lr 1\.00e-03  512 tokens/s  MFU 50%  0:0\d left$", seen[6])
    assert seen[7:] == [""], "the cursor is on a line of its own"
    assert written.count("step 1/4") >= 1, "the first step was drawn while it was the last"


def test_an_exception_and_a_kill_leave_a_terminal_with_its_cursor() -> None:
    written, code = on_terminal("""
        with TrainingDisplay(4) as shown:
            shown.show(step(1))
            raise OSError("no space left")
    """)
    assert code == 1
    assert "OSError: no space left" in screen(written)[-2]
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")
    killed, code = on_terminal("""
        import os, signal
        shown = TrainingDisplay(4)
        shown.show(step(1))
        time.sleep(0.8)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert code == -9
    assert "step 1/4" in killed
    assert killed.rfind("\x1b[?25h") > killed.rfind("\x1b[?25l")


def test_what_others_print_while_it_is_live_stands_above_it() -> None:
    written, _ = on_terminal("""
        with TrainingDisplay(4) as shown:
            shown.show(step(1))
            time.sleep(0.8)
            print("a library's line")
            print("a warning", file=sys.stderr)
            time.sleep(0.8)
    """)
    seen = screen(written)
    assert seen[:2] == ["a library's line", "a warning"]
    assert seen[-2].startswith("█" * 6 + "░" * 18 + " step 1/4")


def test_a_narrow_terminal_gets_a_shorter_line_and_not_two() -> None:
    written, code = on_terminal(
        """
        with TrainingDisplay(4) as shown:
            shown.show(step(1))
        """,
        columns=40,
    )
    assert code == 0
    seen = screen(written, columns=40)
    assert seen[-3].startswith("experts: ")
    assert seen[-2] == "██████░░░░░░░░░░░░░░░░░░ step 1/4  loss…"


def record(number: int) -> dict[str, Any]:
    timing = {"seconds": 2.0, "tokens_per_second": 512.0, "mfu": 0.5}
    return {"kind": "step", "step": number, "loss": 1.5, "lr": 1e-3, "domains": {}, "experts": {}, "timing": timing}


def test_a_file_gets_the_first_step_the_last_and_one_every_so_many_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(training_display.time, "perf_counter", lambda: now[0])
    with training_display.TrainingDisplay(8, every=10) as shown:
        for number in range(1, 9):
            now[0] += 4
            shown.show(record(number))
        shown.show({"kind": "validation", "step": 8, "mean": 2.0, "losses": {"books": 2.0}})
        shown.show({"kind": "event", "step": 8, "what": "spike", "message": "the loss jumped"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines[:4]] == ["step 1", "step 4", "step 7", "step 8"]
    assert lines[0] == "step 1/8  loss 1.5000  lr 1.00e-03  512 tokens/s  MFU 50%  0:14 left"
    assert lines[4:] == ["validation at step 8: mean 2.0000  books 2.0000", "step 8: the loss jumped"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.2, "1:00"), (3599.5, "1:00:00"), (90061, "25:01:01")])
def test_a_clock_counts_up_to_whole_seconds(seconds: float, text: str) -> None:
    assert training_display.clock(seconds) == text
