"""What DVC keeps takes its place on the disk once, and nothing writes through a link into its cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import assert_kept_once, obey_file_modes
from tests.flows.conftest import judge


def dvc(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        capture_output=True,
        text=True,
        preexec_fn=obey_file_modes,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_outputs_are_kept_once_through_runs_checkouts_and_changes(toy: Path) -> None:
    dvc("repro")
    assert_kept_once(toy)
    assert (toy / "runs/toy/moe/part").stat().st_mode & 0o777 == 0o444  # nobody writes to a file that the cache shares

    (toy / "source.txt").write_text("other texts")
    judge(toy, 1.4)
    dvc("repro")
    assert_kept_once(toy)

    for folder in ("data/corpora/toy", "runs/toy/moe"):
        for file in (toy / folder).iterdir():
            file.unlink()
        (toy / folder).rmdir()
    dvc("checkout")
    assert "up to date" in dvc("status")
    assert_kept_once(toy)
