"""One DAG: the flow and `dvc repro` leave the same dvc.lock. tests/e2e/test_readme.py shows it of the real stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.upcycle import upcycle
from tests.flows.conftest import judge, repro

pytestmark = pytest.mark.usefixtures("server", "dvc_in_process")


def test_dvc_repro_and_the_flow_leave_the_same_dvc_lock(toy: Path, templates: dict[str, Path]) -> None:
    """Two fresh projects of the same content, one run by DVC and one by the flow; nothing in the toy is timed."""
    upcycle("toy")
    assert entries(toy / "dvc.lock") == entries(templates["done"] / "dvc.lock")


def test_after_a_change_both_agree_again(done_toy: Path) -> None:
    judge(done_toy, 1.25)
    settings = done_toy / "pipelines.yaml"
    settings.write_text(settings.read_text().replace("learning_rate: 1e-3", "learning_rate: 2e-3"))
    upcycle("toy")
    lock = (done_toy / "dvc.lock").read_bytes()
    repro(done_toy)
    assert (done_toy / "dvc.lock").read_bytes() == lock


def entries(lock: Path) -> dict[str, object]:
    """dvc.lock without its order, which is that in which the stages ended."""
    from ruamel.yaml import YAML

    stages: dict[str, object] = YAML(typ="safe", pure=True).load(lock.read_text())["stages"]
    return stages
