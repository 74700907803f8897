"""One DVC stage = one Prefect task: order, caching, retries, artifacts, errors, cancellation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow
from prefect.artifacts import Artifact
from prefect.settings import PREFECT_API_URL
from ruamel.yaml import YAML

from flows import dag, stages
from flows.upcycle import summarise, upcycle
from tasks.scratch import BusyError, workspace
from tasks.settings import SettingsError
from tests.flows.conftest import alive, judge, ran, repro, until

ALL = ["model", "sources", "corpus", "partition", "mixture", "pretrain", "control", "evaluate", "report"]


pytestmark = pytest.mark.usefixtures("server")


@pytest.mark.usefixtures("dvc_in_process")
def test_a_run_executes_every_stage_once_in_order_with_the_lock_of_dvc_repro_and_a_second_run_none(
    toy: Path, templates: dict[str, Path]
) -> None:
    """`dvc repro` ran the same in another project; nothing in the toy is timed."""
    outcomes = upcycle("toy")
    order = ran(toy)
    assert sorted(order) == sorted(ALL)
    assert order[2:] == ALL[2:]  # model and sources run beside each other
    assert all(outcome.ran for outcome in outcomes)
    assert entries(toy / "dvc.lock") == entries(templates["done"] / "dvc.lock")
    assert json.loads(Artifact.get("pretrain-toy").data) == [{"metric": "value", "value": 1}]
    table = json.loads(Artifact.get("evaluate-toy").data)
    assert {"metric": "trained.bits_per_byte.prose", "value": 1.5} in table
    assert {"metric": "trained.parameters.active", "value": 50} in table

    page = Artifact.get("upcycle-toy").data
    assert f"`{toy}/runs/toy/report/index.html`" in page
    assert "file://" not in page

    state = upcycle("toy", return_state=True)
    assert ran(toy) == []
    assert summarise(state.result()) == "everything is up to date"


def test_a_stage_that_dvc_finds_up_to_date_ends_in_the_state_cached(done_toy: Path) -> None:
    assert only("mixture@toy").name == "Cached"
    assert only("mixture@toy", force=True).name == "Completed"
    assert ran(done_toy) == ["mixture"]


@pytest.mark.usefixtures("dvc_in_process")
def test_a_result_from_the_run_cache_counts_as_cached(done_toy: Path) -> None:
    settings = done_toy / "pipelines.yaml"
    before = settings.read_text()
    settings.write_text(before.replace("learning_rate: 1e-3", "learning_rate: 2e-3"))
    repro(done_toy)
    settings.write_text(before)
    ran(done_toy)
    assert dag.changes(["partition@toy"])["partition@toy"] == ["setting pipelines.toy: modified"]
    assert only("partition@toy").name == "Cached"
    assert ran(done_toy) == []


def test_a_stage_with_retries_in_its_meta_is_run_again(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "RETRY_DELAYS", [0, 0])
    (toy / "fail" / "model").write_text("1")
    assert only("model@toy").name == "Completed"
    assert ran(toy) == ["model", "model"]


def test_a_failing_stage_ends_the_run_with_its_last_words_and_its_followers_do_not_start(done_toy: Path) -> None:
    (done_toy / "fail" / "partition").write_text("9")
    with pytest.raises(dag.StageError, match=r"(?s)partition@toy: `python step.py partition .*partition went wrong"):
        upcycle("toy", force=["partition"])
    assert ran(done_toy) == ["partition"]


@pytest.mark.usefixtures("dvc_in_process")
def test_refresh_reads_the_sources_again_and_stops_there_if_they_are_the_same(done_toy: Path) -> None:
    upcycle("toy", refresh=True)
    assert ran(done_toy) == ["sources"]


def test_settings_are_checked_before_anything_runs(toy: Path) -> None:
    settings = toy / "pipelines.yaml"
    settings.write_text(settings.read_text().replace("top_k: 2", "top_k: 9"))
    with pytest.raises(SettingsError, match=r"pipelines\.toy\.partition: top_k = 9 is more than experts = 4"):
        upcycle("toy")
    assert ran(toy) == []


def test_a_second_run_of_the_same_pipeline_is_refused_and_names_the_first(toy: Path) -> None:
    with (
        workspace("run", "toy"),
        pytest.raises(BusyError, match=rf"run toy is already being run by process {os.getpid()}"),
    ):
        upcycle("toy")


def test_a_stage_is_stopped_after_its_timeout(toy: Path) -> None:
    (stage,) = dag.ancestors("model@toy")
    dag.refresh_code([stage.name])
    (toy / "sleep" / "model").touch()
    with pytest.raises(dag.StageError, match=r"model@toy: stopped after meta\.timeout"):
        stages.execute(replace(stage, timeout=1 / 20), force=False, log=lambda _: None)
    if (pid := toy / "pids" / "model").exists():
        assert not alive(int(pid.read_text()))


def test_light_stages_run_beside_each_other(toy: Path) -> None:
    """Each of two stages waits until the other has started: alone, neither would end."""
    meet = """
if name in ("model", "sources"):
    Path("pids", name).touch()
    while not (Path("pids/model").exists() and Path("pids/sources").exists()):
        time.sleep(0.01)
"""
    step = (toy / "step.py").read_text()
    (toy / "step.py").write_text(step.replace('if Path("sleep"', meet + 'if Path("sleep"', 1))
    assert only("model@toy", "sources@toy").name == "Completed"
    assert sorted(ran(toy)) == ["model", "sources"]


def entries(lock: Path) -> dict[str, object]:
    """dvc.lock without its order, which is that in which the stages ended."""
    stages: dict[str, object] = YAML(typ="safe", pure=True).load(lock.read_text())["stages"]
    return stages


def only(*names: str, force: bool = False) -> Any:
    """Run single stages in a flow of their own, and return the final state of the last."""
    wanted = [stage for stage in dag.ancestors("report@toy") if stage.name in names]

    @flow
    def some() -> list[stages.Outcome]:
        return stages.run(wanted, force=set(names) if force else None)

    state = some(return_state=True)
    state.result()
    return final_states(state)[names[-1]]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("stage", "number"), [("corpus", signal.SIGTERM), ("partition", signal.SIGKILL)]
)  # partition runs in the main thread, corpus is submitted to another
def test_no_process_outlives_a_run_that_is_ended(
    done_toy: Path, server: dict[str, str], *, stage: str, number: signal.Signals
) -> None:
    toy = done_toy
    (toy / "sleep" / stage).touch()
    run = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "run", "toy", "--force", stage],
        env={**os.environ, **server}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A suite that a script started in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    pid_file = toy / "pids" / stage
    until(pid_file.exists, seconds=60)
    until(pid_file.read_text, seconds=5)
    sleeper = int(pid_file.read_text())
    run.send_signal(number)
    output, _ = run.communicate(timeout=60)
    until(lambda: not alive(sleeper), seconds=30)
    assert run.returncode != 0
    if number != signal.SIGKILL:
        assert "Traceback" not in output
        assert "run again to go on" in output
    (toy / "sleep" / stage).unlink()
    ran(toy)
    assert only(f"{stage}@toy").name == "Cached"  # no lock is left, and DVC has the last whole result
    assert ran(toy) == []


def task_runs(state: Any) -> list[dict[str, Any]]:
    """The task runs of a flow run, as the server has recorded them."""
    body = {"flow_runs": {"id": {"any_": [str(state.state_details.flow_run_id)]}}, "limit": 50, "sort": "NAME_ASC"}
    request = urllib.request.Request(
        f"{PREFECT_API_URL.value()}/task_runs/filter",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        runs: list[dict[str, Any]] = json.load(answer)
    return runs


def final_states(state: Any) -> dict[str, Any]:
    """The final states of a flow run's tasks, by name."""
    states: dict[str, Any] = {}

    def recorded() -> bool:  # the server records task runs from events, a moment later, and first without a state
        runs = task_runs(state)
        if not all(run["state"] for run in runs):
            return False
        states.update({run["name"]: SimpleNamespace(**run["state"]) for run in runs})
        return bool(states) and all(s.type in ("COMPLETED", "FAILED") for s in states.values())

    until(recorded, seconds=20)
    return states


@pytest.mark.usefixtures("dvc_in_process")
def test_after_a_change_the_flow_and_dvc_repro_leave_the_same_lock(done_toy: Path) -> None:
    judge(done_toy, 1.25)
    settings = done_toy / "pipelines.yaml"
    settings.write_text(settings.read_text().replace("learning_rate: 1e-3", "learning_rate: 2e-3"))
    upcycle("toy")
    lock = (done_toy / "dvc.lock").read_bytes()
    repro(done_toy)
    assert (done_toy / "dvc.lock").read_bytes() == lock
