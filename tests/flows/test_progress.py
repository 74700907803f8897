"""What a person sees of a run."""

from __future__ import annotations

import sys

import pytest

from flows import progress
from tests.terminals import Terminal


def test_plain_lines_name_the_stage_and_how_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.display(terminal=False):
        progress.state("model@demo", "waiting")
        progress.state("model@demo", "running")
        progress.line("model@demo", "fetching")
        progress.state("model@demo", "done")
        progress.state("corpus@demo", "cached")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["model@demo | == running", "model@demo | fetching"]
    assert lines[2].startswith("model@demo | == done 0 s")
    assert lines[3] == "corpus@demo | == cached"


def test_the_live_table_shows_the_last_line_of_a_running_stage_cut_and_without_its_markup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal.open(monkeypatch, columns=60)
    monkeypatch.setattr(sys, "stdout", terminal)
    with progress.display():
        progress.state("model@demo", "cached")
        progress.state("pretrain@demo", "running")
        progress.line("pretrain@demo", "step 3/48 [bold] loss 2.5 " + "x" * 500)
    first, second, rest = terminal.screen(columns=60)
    assert first.split()[:3] == ["≡", "model@demo", "cached"]
    assert second.split()[:3] == ["▶", "pretrain@demo", "running"]
    assert "step 3/48 [bold]" in second
    assert rest == ""


def test_after_the_display_events_go_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.display(terminal=False):
        pass
    progress.line("model@demo", "unseen")
    assert capsys.readouterr().out == ""
