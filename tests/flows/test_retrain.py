"""Scheduled retraining: nothing to do, accept, refuse, publish."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.artifacts import Artifact

from flows.retrain import retrain
from tests.flows.conftest import judge, ran

pytestmark = pytest.mark.usefixtures("server")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def test_the_gate_through_the_weeks(done_toy: Path) -> None:
    """First model accepted; nothing to do; changed corpus, worse model refused; better one accepted and published."""
    first = retrain("toy", return_state=True)
    assert (first.name, first.type.value) == ("Accepted", "COMPLETED")
    assert ran(done_toy) == ["sources"]
    record = Path("runs/toy/accepted.json")
    assert json.loads(record.read_text())["trained"] == 1.5

    second = retrain("toy", return_state=True)
    assert (second.name, second.type.value) == ("Nothing to do", "COMPLETED")
    assert ran(done_toy) == ["sources"]
    before = record.read_text()

    (done_toy / "source.txt").write_text("new texts")
    (done_toy / "values" / "sources").write_text('{"prose": "new"}')
    judge(done_toy, 1.6)
    third = retrain("toy", return_state=True)
    assert (third.name, third.type.value) == ("Refused", "FAILED")
    assert "1.6000 bits per byte is 0.1000 worse than the accepted 1.5000" in third.message
    assert ran(done_toy) == ["sources", "corpus", "mixture", "partition", "pretrain", "evaluate", "report"]
    assert record.read_text() == before
    assert "| last accepted | 1.5000 |" in str(Artifact.get("retrain-toy").data)


def test_a_better_model_is_accepted_committed_and_pushed(done_toy: Path, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    subprocess.run([sys.executable, "-m", "dvc", "remote", "add", "--default", "store", str(remote)], check=True)
    (done_toy / "README").write_text("staged by somebody else")
    git("add", "README")
    state = retrain("toy", publish=True, force=True, return_state=True)
    assert state.name == "Accepted"
    assert "pretrain" in ran(done_toy)
    committed = git("show", "--name-only", "--format=%s", "HEAD").split("\n")
    assert committed[0] == "Accept the retrained toy"
    assert {"dvc.lock", "runs/toy/accepted.json", "runs/toy/evaluation.json", "runs/toy/pretrain.json"} <= set(
        committed
    )
    assert "README" not in committed
    assert any(remote.rglob("*"))
    assert "pushed" in state.message
