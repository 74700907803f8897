"""What a person sees of a run, on a terminal and elsewhere."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tasks.pretrain.log import training_display
from tasks.pretrain.log.training_display import TrainingDisplay
from tests.terminals import Terminal

EXPERTS = {"used": 1.0, "entropy": 0.875, "peak": 0.25, "dead": 3, "layers": {}}
DOMAINS = {"books": {"loss": 3.25, "windows": 2, "epochs": 0.125}}
VALIDATION = {
    "kind": "validation", "step": 0, "mean": 2.25, "losses": {"books": 3.5, "code[/b]": 1.0},
    "weights": {"books": 0.75, "code[/b]": 0.25},
}  # fmt: skip
EVENT = {"kind": "event", "step": 2, "what": "dead_experts", "message": "layer 3: expert 7 had no token [in] steps"}


def step(number: int) -> dict[str, Any]:
    return {
        "kind": "step", "step": number, "loss": 1.5, "lr": 1e-3, "domains": DOMAINS, "experts": EXPERTS,
        "timing": {"seconds": 2.0, "tokens_per_second": 512.0, "mfu": 0.5},
    }  # fmt: skip


def test_a_terminal_shows_the_bar_the_domains_and_the_experts_and_above_them_what_happened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal.open(monkeypatch)
    monkeypatch.setattr(training_display.sys, "stdout", terminal)
    with TrainingDisplay(4) as shown:
        for record in (VALIDATION, step(1), EVENT, step(3)):
            shown.show(record)
    seen = terminal.screen()
    assert seen[0] == "validation at step 0: mean 2.2500  books 3.5000  code[/b] 1.0000"
    assert seen[1] == "step 2: layer 3: expert 7 had no token [in] steps"
    assert seen[2].split() == ["domain", "weight", "loss", "validation", "epochs"]
    assert seen[3].split() == ["books", "0.750", "3.2500", "3.5000", "0.125"]
    assert seen[4].split() == ["code[/b]", "0.250", "–", "1.0000", "–"]
    assert seen[5] == "experts: entropy 0.875 of 1, busiest 25.0%, 3 without tokens"
    assert re.match(r"█{18}░{6} step 3/4  loss 1\.5000  lr 1\.00e-03  512 tokens/s  MFU 50%  0:0\d left$", seen[6])
    assert seen[7:] == [""], "the cursor is on a line of its own"


def test_a_narrow_terminal_gets_a_shorter_line_and_not_two(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal.open(monkeypatch, columns=40)
    monkeypatch.setattr(training_display.sys, "stdout", terminal)
    with TrainingDisplay(4) as shown:
        shown.show(step(1))
    seen = terminal.screen(columns=40)
    assert seen[-3].startswith("experts: ")
    assert seen[-2] == "██████░░░░░░░░░░░░░░░░░░ step 1/4  loss…"


def test_a_file_gets_the_first_step_the_last_and_one_every_so_many_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(training_display.time, "monotonic", lambda: now[0])
    with TrainingDisplay(8, every=10) as shown:
        for number in range(1, 9):
            now[0] += 4
            shown.show(step(number))
        shown.show({"kind": "validation", "step": 8, "mean": 2.0, "losses": {"books": 2.0}})
        shown.show({"kind": "event", "step": 8, "what": "spike", "message": "the loss jumped"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines[:4]] == ["step 1", "step 4", "step 7", "step 8"]
    assert lines[0] == "step 1/8  loss 1.5000  lr 1.00e-03  512 tokens/s  MFU 50%  0:14 left"
    assert lines[4:] == ["validation at step 8: mean 2.0000  books 2.0000", "step 8: the loss jumped"]
