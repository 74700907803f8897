from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.corpus import progress
from tasks.corpus.build import Built

ROOT = Path(__file__).parents[2]
BUILT = Built(
    splits={"train": [{"tokens": 1000}], "heldout": [{"tokens": 234}]},
    rules={"read": 10, "bad": 1, "empty": 0, "kept": 9},
    bad={"invalid JSON": "1, the first in a.jsonl, row 3: torn"},
    encoded_tokens=1234,
    seconds=2.0,
)


def test_without_a_terminal_there_are_plain_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress(["code"]) as shown:
        report = shown.reporter("code")
        for second in range(25):
            now = float(second)
            report(second, second * 100)
        shown.done("code", BUILT)
    assert capsys.readouterr().err.splitlines() == [
        "code: 11 documents, 1,100 tokens …",
        "code: 22 documents, 2,200 tokens …",
        "code: 1,234 tokens in 2.0 s; records: 10 read, 1 bad, 9 kept",
        "code: bad: 1, the first in a.jsonl, row 3: torn",
    ]


def test_on_a_terminal_there_is_one_live_display() -> None:
    code = (
        "from tests.corpus.test_progress import BUILT; from tasks.corpus.progress import Progress\n"
        "with Progress(['code', 'books']) as shown:\n"
        "    shown.reporter('code')(5, 6789); shown.done('code', BUILT)\n"
    )
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=terminal, env=environment)
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
    assert process.wait() == 0
    text = output.decode()
    assert "6,789 tokens" in text
    assert "✓ code" in text
    assert "a.jsonl, row 3: torn" in text
    assert "\x1b[?25l" in text  # the cursor is hidden while it is live
