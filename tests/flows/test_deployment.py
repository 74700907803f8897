"""Deployments as a platform team uses them: a real server, a real worker, `prefect deployment run`. The README's test
runs those of the real pipeline."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.testing.cli import invoke_and_assert

from tests.flows.conftest import alive, until

DEPLOYMENTS = """
deployments:
  - name: toy
    entrypoint: flows/upcycle.py:upcycle
    parameters: {pipeline: toy}
    work_pool: {name: local}
    concurrency_limit: {limit: 1, collision_strategy: CANCEL_NEW}
  - name: toy
    entrypoint: flows/retrain.py:retrain
    parameters: {pipeline: toy}
    work_pool: {name: local}
    schedules:
      - {cron: "0 3 * * 1", timezone: UTC, active: true}
"""


@pytest.mark.e2e
def test_deployed_flows_run_on_a_worker_and_a_cancelled_one_leaves_no_process(
    done_toy: Path, server: dict[str, str]
) -> None:

    def prefect(*arguments: str, code: int = 0) -> str:
        """Call the command line in this process, which reaches the server too."""
        output: str = invoke_and_assert(["--no-prompt", *arguments], expected_code=code).output
        return output

    def next_runs() -> list[FlowRun]:
        scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
        with get_client(sync_client=True) as client:
            return client.read_flow_runs(flow_run_filter=scheduled)

    with (done_toy / "pipelines.yaml").open("a") as file:
        file.write(DEPLOYMENTS)
    prefect("work-pool", "create", "local", "--type", "process")
    prefect("deploy", "--prefect-file", "pipelines.yaml", "--all")
    said = prefect("deployment", "run", "upcycle/toy", "--param", "refresh=perhaps", code=1)
    assert "refresh" in said
    assert "Traceback" not in said
    log = done_toy / ".scratch" / "worker.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local", "--name", "here"],
            env={**os.environ, **server, "PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: "started!" in log.read_text(), seconds=60, otherwise=log.read_text)
        until(next_runs, seconds=60, otherwise=log.read_text)  # of the schedule

        (done_toy / "sleep" / "partition").touch()
        started = prefect("deployment", "run", "upcycle/toy", "--param", 'force=["partition"]')
        pid = done_toy / "pids" / "partition"
        until(lambda: pid.exists() and pid.read_text(), seconds=60, otherwise=log.read_text)
        assert alive(int(pid.read_text()))
        prefect("flow-run", "cancel", re.search(r"UUID: (\S+)", started)[1])
        until(lambda: not alive(int(pid.read_text())), seconds=45, otherwise=log.read_text)
    finally:
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
