"""One DAG: the flow and `dvc repro` leave the same dvc.lock."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flows.upcycle import upcycle
from tests.flows.conftest import judge, moeforge, repro


def test_dvc_repro_and_the_flow_leave_the_same_dvc_lock(
    toy: Path, templates: dict[str, Path], server: dict[str, str]
) -> None:
    """Two fresh projects of the same content, one run by DVC and one by the flow; nothing in the toy is timed."""
    upcycle("toy")
    assert entries(toy / "dvc.lock") == entries(templates["done"] / "dvc.lock")


def test_after_a_change_both_agree_again(done_toy: Path, server: dict[str, str]) -> None:
    judge(done_toy, 1.25)
    settings = done_toy / "pipelines.yaml"
    settings.write_text(settings.read_text().replace("learning_rate: 1e-3", "learning_rate: 2e-3"))
    upcycle("toy")
    lock = (done_toy / "dvc.lock").read_bytes()
    repro(done_toy)
    assert (done_toy / "dvc.lock").read_bytes() == lock


@pytest.mark.e2e
def test_the_real_stages_run_once_through_the_flow_and_leave_nothing_to_dvc(
    tiny_repo: Path, server: dict[str, str], request: pytest.FixtureRequest
) -> None:
    """The whole pipeline on a tiny model. Timings stand in its metrics, so two runs cannot agree byte for byte: after
    the flow, `dvc repro` must find nothing to do and leave dvc.lock as it is. `.scratch` is on another disk."""
    if Path("/dev/shm").is_dir():
        elsewhere = tempfile.mkdtemp(dir="/dev/shm")
        request.addfinalizer(lambda: shutil.rmtree(elsewhere))
        (tiny_repo / ".scratch").symlink_to(elsewhere)
    first = moeforge("run", "tiny", **server)
    assert first.returncode == 0, first.stdout + first.stderr
    lock = (tiny_repo / "dvc.lock").read_bytes()
    dvc = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    assert "Data and pipelines are up to date." in dvc.stdout
    assert "Running stage" not in dvc.stdout
    assert (tiny_repo / "dvc.lock").read_bytes() == lock
    second = moeforge("run", "tiny", **server)
    assert "tiny: everything is up to date" in second.stdout
    for path in ("data/corpora/tiny", "runs/tiny/mixture.json", "runs/tiny/moe", "runs/tiny/model"):
        verified = moeforge("verify", path)
        assert (verified.returncode, verified.stdout.strip()) == (0, f"{path}: sound"), verified.stderr
        assert moeforge("inspect", path).returncode == 0


def entries(lock: Path) -> dict[str, object]:
    """dvc.lock without its order, which is that in which the stages ended."""
    from ruamel.yaml import YAML

    found: dict[str, object] = YAML(typ="safe", pure=True).load(lock.read_text())["stages"]
    return found
