"""`moeforge evaluate`: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows import cli, evaluate


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "raise_on_sigterm", lambda: None)


def evaluated(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["evaluate", *arguments])


def test_a_checkpoint_is_judged_without_any_project_around_it(tiny_model: Path) -> None:
    Path("book.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    said = evaluated(str(tiny_model), "--text", "book.txt", "--seq-len", "32", "--windows", "2")
    assert said.exit_code == 0, said.output
    folder = Path("evaluations", tiny_model.name)
    bits = json.loads((folder / "evaluation.json").read_text())["models"][0]["bits_per_byte"]
    assert f"{bits['book']:.3f}" in said.stdout
    assert "".join(said.stdout.split()).endswith(f"page:{(folder / 'index.html').resolve()}")
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "index.html"}


def test_a_mistake_is_one_message(tiny_model: Path) -> None:
    Path("empty").mkdir()
    for arguments, message in (
        ([str(tiny_model)], "has no heldout.json; say on what to judge it"),
        (["empty", "--text", "x.txt"], "empty: no checkpoint here (config.json is missing)"),
        ([str(tiny_model), "--text", "x.txt"], "x.txt: no such file"),
    ):
        said = evaluated(*arguments)
        assert said.exit_code == 1, said.output
        assert said.stderr.startswith("moeforge: ")
        assert message in said.stderr
        assert "unexpected" not in said.stderr
