"""The units of a swarm through Prefect's task runners, and the flow around them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import prefect.context
import pytest
from typer.testing import CliRunner

from flows import cli, tokenise, weigh
from tasks.plugins.proxy_runs.swarm import Unit

UNITS = [Unit(key=f"{i:016x}", weights={"a": 1.0}, seed=i) for i in range(12)]


def note(folder: Path, unit: Unit) -> None:
    """Leave a line for each call."""
    with (folder / unit.key).open("a") as file:
        file.write("called\n")


@pytest.mark.parametrize("runner", ["thread", "process", "dask"])
def test_every_unit_of_a_swarm_is_trained_once_by_the_flows_task_runner(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: tokenise.RunnerName
) -> None:
    if runner == "dask":
        pytest.importorskip("prefect_dask")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # this module's folder too
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setattr(prefect.context, "GLOBAL_SETTINGS_CONTEXT", prefect.context.SettingsContext.get())

    def share(pipeline: str, *, run: Callable[[Any, list[Any]], None]) -> None:
        assert pipeline == "toy"
        run(partial(note, tmp_path), UNITS)

    monkeypatch.setattr(weigh.mixture, "share", share)
    pool = tokenise.task_runner(runner, workers=2, address=None)
    with tokenise.reachable_server():
        weigh.share_out.with_options(task_runner=pool)("toy", workers=2)
    assert {path.name: path.read_text() for path in tmp_path.glob("0*")} == {unit.key: "called\n" for unit in UNITS}


def test_without_a_swarm_the_command_runs_the_stages_up_to_the_weights(done_toy: Path, server: dict[str, str]) -> None:
    (done_toy / "runs/toy/mixture.json").unlink()
    result = CliRunner().invoke(cli.app, ["weigh", "toy", "--workers", "2"])
    assert result.exit_code == 0, result.output
    assert (done_toy / "runs/toy/mixture.json").exists()  # by DVC's run cache, as the stage alone
    assert "toy: weights in runs/toy/mixture.json" in result.output
