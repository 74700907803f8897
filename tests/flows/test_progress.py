"""What a person sees of a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flows import progress


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


def test_the_live_table_shows_the_last_line_of_a_running_stage_and_not_its_markup() -> None:
    live = progress.StageDisplay(terminal=True)
    live.state("model@demo", "cached")
    live.state("pretrain@demo", "running")
    live.line("pretrain@demo", "step 3/48 [bold] loss 2.5")
    console = Console(file=io.StringIO(), width=80)
    console.print(live.table())
    first, second = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "model@demo" in first
    assert "cached" in first
    assert "step 3/48 [bold] loss 2.5" in second


def test_a_long_line_does_not_break_the_table() -> None:
    live = progress.StageDisplay(terminal=True)
    live.state("pretrain@demo", "running")
    live.line("pretrain@demo", "x" * 500)
    console = Console(file=io.StringIO(), width=60)
    console.print(live.table())
    assert [len(line) for line in console.file.getvalue().splitlines()] == [60]  # type: ignore[attr-defined]


def test_after_the_display_events_go_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.display(terminal=False):
        pass
    progress.line("model@demo", "unseen")
    assert capsys.readouterr().out == ""
