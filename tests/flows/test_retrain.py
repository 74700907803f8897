"""Scheduled retraining: nothing to do, accept, refuse, publish."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.artifacts import Artifact
from typer.testing import CliRunner

from flows import cli, dag, stages
from flows.retrain import retrain
from tasks import scratch
from tests.flows.conftest import judge, ran

pytestmark = pytest.mark.usefixtures("server", "dvc_in_process")


class WithoutDVC:
    """Runs stages that are `due`, and those that need them. DVC's own part is tested in test_dag and test_stages."""

    def __init__(self) -> None:
        self.plan = dag.ancestors("report@toy")
        self.due: dict[str, list[str]] = {}

    def changes(self, names: list[str]) -> dict[str, list[str]]:
        return {name: self.due.get(name, []) for name in names}

    def run(self, plan: list[dag.Stage], *, force: set[str] | None = None) -> list[stages.Outcome]:
        done: set[str] = set()
        for stage in plan:
            if stage.name in (force or ()) or self.due.pop(stage.name, None) or done & set(stage.needs):
                done.add(stage.name)
                self._make(stage)
        return [stages.Outcome(name=stage.name, ran=stage.name in done, seconds=0) for stage in plan]

    def _make(self, stage: dag.Stage) -> None:
        sources, model = Path("data/corpora/toy.sources.json"), Path("runs/toy/model")
        before = sources.read_text()
        for out in stage.outs:
            scratch.discard(out)
        subprocess.run(stage.cmd.split(), check=True, env={**os.environ, "PATH": str(Path(sys.executable).parent)})
        if sources.read_text() != before:
            self.due["corpus@toy"] = [f"dependency {sources}: modified"]
        entry = {"path": str(model), "md5": hashlib.md5((model / "part").read_bytes()).hexdigest()}
        Path("dvc.lock").write_text(json.dumps({"stages": {"report@toy": {"outs": [entry]}}}))


@pytest.fixture
def without_dvc(done_toy: Path, monkeypatch: pytest.MonkeyPatch) -> WithoutDVC:
    """The finished toy project, with stages that cost next to nothing."""
    toy = WithoutDVC()
    monkeypatch.setattr(dag, "ancestors", lambda _target: toy.plan)
    monkeypatch.setattr(dag, "changes", toy.changes)
    monkeypatch.setattr(stages, "run", toy.run)
    return toy


def moeforge(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def shipped() -> str:
    """What a consumer reads of the toy's model."""
    return (Path("runs/toy/release").resolve() / "part").read_text()


def test_the_gate_through_the_weeks(done_toy: Path, without_dvc: WithoutDVC) -> None:
    """First model accepted; nothing to do; changed corpus, worse model refused; then one that noise alone makes worse;
    then a person goes back."""
    first = retrain("toy", return_state=True)
    assert (first.name, first.type.value) == ("Accepted", "COMPLETED")
    assert ran(done_toy) == ["sources"]
    record = Path("runs/toy/accepted.json")
    assert json.loads(record.read_text())["trained"] == 1.5
    assert shipped() == '[1.5, 0.0, "abcd"]texts'

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
    assert "on the same windows of prose" in third.message
    assert ran(done_toy) == ["sources", "corpus", "partition", "mixture", "pretrain", "control", "evaluate", "report"]
    assert record.read_text() == before
    assert "| last accepted | 1.5000 |" in str(Artifact.get("retrain-toy").data)
    assert shipped() == '[1.5, 0.0, "abcd"]texts'
    refused = next(Path("runs/toy/refused").iterdir())
    assert (refused / "model/part").read_text() == '[1.6, 0.0, "abcd"]new texts'
    assert "worse than the accepted" in json.loads((refused / "refusal.json").read_text())["why"]

    fourth = retrain("toy", return_state=True)
    assert fourth.name == "Nothing to do"
    assert "runs/toy/model is not the accepted one" in fourth.message
    assert ran(done_toy) == ["sources"]

    (done_toy / "source.txt").write_text("other texts")
    (done_toy / "values" / "sources").write_text('{"prose": "other"}')
    judge(done_toy, 1.51, error=0.02, names="abyz")
    fifth = retrain("toy", return_state=True)
    assert fifth.name == "Accepted", fifth.message
    assert json.loads(record.read_text())["slipped"] == pytest.approx(0.01)
    assert shipped() == '[1.51, 0.02, "abyz"]other texts'
    ran(done_toy)

    back = moeforge("rollback", "toy")
    assert back.exit_code == 0, back.stderr
    assert shipped() == '[1.5, 0.0, "abcd"]texts'
    assert record.read_text() == before
    sixth = retrain("toy", return_state=True)
    assert sixth.name == "Nothing to do"  # what was rolled back is not shipped again by itself
    assert shipped() == '[1.5, 0.0, "abcd"]texts'
    assert "commit runs/toy/accepted.json" in back.stdout
    again = moeforge("release", "toy")
    assert again.exit_code == 0, again.stderr
    assert shipped() == '[1.51, 0.02, "abyz"]other texts'


def test_a_better_model_is_accepted_committed_and_pushed(done_toy: Path, tmp_path: Path) -> None:
    """The remote cannot be reached at first: the next run makes it good, and trains nothing."""
    remote, absent = tmp_path / "remote", tmp_path / "file"
    absent.write_text("no folder")
    dvc = [sys.executable, "-m", "dvc", "remote"]
    subprocess.run([*dvc, "add", "--default", "store", str(absent / "store")], check=True)
    (done_toy / "README").write_text("staged by somebody else")
    git("add", "README")
    state = retrain("toy", publish=True, force=True, return_state=True)
    assert state.type.value == "FAILED"
    assert "is accepted and shipped here, but publishing failed: `" in state.message
    assert "dvc push" in state.message
    assert shipped() == '[1.5, 0.0, "abcd"]texts'
    assert "pretrain" in ran(done_toy)
    committed = git("show", "--name-only", "--format=%s", "HEAD").split("\n")
    assert committed[0] == "Accept the retrained toy"
    assert {"dvc.lock", "runs/toy/accepted.json", "runs/toy/evaluation.json", "runs/toy/pretrain.json"} <= set(
        committed
    )
    assert "README" not in committed

    subprocess.run([*dvc, "modify", "store", "url", str(remote)], check=True)
    second = retrain("toy", publish=True, return_state=True)
    assert second.name == "Nothing to do"
    assert second.message.endswith("nothing to commit; pushed")
    assert any(remote.rglob("*"))
    assert ran(done_toy) == ["sources"]
    third = retrain("toy", publish=True, return_state=True)
    assert third.message.endswith("everything after them are unchanged")


def test_changed_code_alone_retrains_only_if_asked(done_toy: Path, without_dvc: WithoutDVC) -> None:
    assert retrain("toy", return_state=True).name == "Accepted"
    ran(done_toy)
    (done_toy / "values/pretrain").write_text('{"code": "0123abc"}')
    without_dvc.due["pretrain@toy"] = ["code: jobs.pretrain modified"]
    judge(done_toy, 1.25)
    idle = retrain("toy", return_state=True)
    assert idle.name == "Nothing to do"
    assert "the code has changed since an unknown commit trained the model before: " in idle.message
    assert "pretrain (jobs.pretrain modified): code=true retrains with the present code" in idle.message
    assert ran(done_toy) == ["sources"]

    asked = retrain("toy", code=True, return_state=True)
    assert asked.name == "Accepted"
    assert "the code has changed" in asked.message
    assert ran(done_toy) == ["sources", "pretrain", "control", "evaluate", "report"]
    assert json.loads(Path("runs/toy/accepted.json").read_text())["code"] == "0123abc"

    without_dvc.due["mixture@toy"] = ["code: jobs.mixture modified"]
    assert "since 0123abc trained the model before: mixture (jobs.mixture" in retrain("toy", return_state=True).message
    ran(done_toy)
    (done_toy / "source.txt").write_text("new texts")
    (done_toy / "values" / "sources").write_text('{"prose": "new"}')
    judge(done_toy, 1.2)
    both = retrain("toy", return_state=True)  # data changed too: it trains with the present code, and says so
    assert both.name == "Accepted"
    assert "since 0123abc trained the model before: mixture (jobs.mixture modified)" in both.message
    assert ran(done_toy) == ["sources", "corpus", "partition", "mixture", "pretrain", "control", "evaluate", "report"]


def test_what_is_released_by_hand_is_what_was_evaluated(done_toy: Path) -> None:
    with (done_toy / "runs/toy/windows.json").open("a") as file:
        file.write(" ")
    refused = moeforge("release", "toy")
    assert refused.exit_code == 1
    assert "evaluate@toy: output runs/toy/windows.json: modified" in refused.stderr
    assert not (done_toy / "runs/toy/release").exists()
    assert "runs/toy/release" not in moeforge("rollback", "toy").stdout
