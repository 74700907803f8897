"""One DAG: the flow and `dvc repro` leave the same dvc.lock. test_stages.py shows it of a run from nothing, and
tests/e2e/test_readme.py of the real stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.upcycle import upcycle
from tests.flows.conftest import judge, repro

pytestmark = pytest.mark.usefixtures("server", "dvc_in_process")


def test_after_a_change_both_agree_again(done_toy: Path) -> None:
    judge(done_toy, 1.25)
    settings = done_toy / "pipelines.yaml"
    settings.write_text(settings.read_text().replace("learning_rate: 1e-3", "learning_rate: 2e-3"))
    upcycle("toy")
    lock = (done_toy / "dvc.lock").read_bytes()
    repro(done_toy)
    assert (done_toy / "dvc.lock").read_bytes() == lock
