"""What DVC keeps takes its place on the disk once; what somebody else gets: a clone, a source archive without git."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows import cli
from tests.conftest import assert_kept_once, obey_file_modes
from tests.flows.conftest import judge, ran


def call(*command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*command], capture_output=True, text=True, preexec_fn=obey_file_modes, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


DVC = (sys.executable, "-m", "dvc")


def test_a_clone_pulls_the_results_and_has_nothing_to_do(
    done_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(*DVC, "remote", "add", "--default", "store", str(tmp_path / "store"))
    call("git", "add", ".dvc/config", "dvc.lock", "data", "runs")
    call("git", "commit", "--quiet", "--message", "A result")
    call(*DVC, "push", "--quiet")
    call("git", "clone", "--quiet", str(done_toy), str(tmp_path / "clone"))
    monkeypatch.chdir(tmp_path / "clone")
    call(*DVC, "pull")
    assert "toy: everything is up to date" in CliRunner().invoke(cli.app, ["run", "toy"]).stdout
    assert not ran(tmp_path / "clone")
    assert call("git", "status", "--short") == ""

    settings = Path("pipelines.yaml")
    entry = settings.read_text().split("corpora:\n  toy:")[1].split("pipelines:")[0]
    settings.write_text(settings.read_text().replace("corpora:\n", f"corpora:\n  never_run:{entry}"))
    call(*DVC, "pull", "--allow-missing")


def test_a_source_archive_says_what_it_lacks(toy: Path) -> None:
    shutil.rmtree(toy / ".git")
    for command in (["run", "toy"], ["status"]):
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 1
        assert "run `git init` there" in result.stderr
        assert result.stderr.count("\n") == 1
    assert "in no git repository" in CliRunner().invoke(cli.app, ["doctor"]).stdout
    call("git", "init", "--quiet")
    assert CliRunner().invoke(cli.app, ["status"]).exit_code == 0


def test_outputs_are_kept_once_through_runs_checkouts_and_changes(toy: Path) -> None:
    call(*DVC, "repro")
    assert_kept_once(toy)
    assert (toy / "runs/toy/moe/part").stat().st_mode & 0o777 == 0o444  # nobody writes to a file that the cache shares

    (toy / "source.txt").write_text("other texts")
    judge(toy, 1.4)
    call(*DVC, "repro")
    assert_kept_once(toy)

    for folder in ("data/corpora/toy", "runs/toy/moe"):
        for file in (toy / folder).iterdir():
            file.unlink()
        (toy / folder).rmdir()
    call(*DVC, "checkout")
    assert "up to date" in call(*DVC, "status")
    assert_kept_once(toy)
