"""Units through Prefect's task runners: batches, retries, errors, ends; and the flow around them."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import prefect.context
import pytest
from prefect import flow
from prefect.artifacts import Artifact
from prefect.context import FlowRunContext
from prefect.flows import load_flow_from_entrypoint

from flows import dag, domains, tokenise
from flows.tokenise import RunnerError, RunnerName, task_runner
from tasks.corpus.prepare.planning import Unit
from tasks.corpus.records import CorpusError
from tests.flows.conftest import ROOT, alive, ran, until
from tests.flows.test_stages import task_runs

UNITS = [Unit(phase="scan", domain=domain, task=task) for domain in ("prose", "code") for task in range(20)]


def share(
    function: Callable[[Unit], None], units: list[Unit], *, runner: RunnerName = "thread", workers: int = 2
) -> Any:
    """Run units in a flow of their own; the final state."""

    @flow(persist_result=False)
    def some() -> None:
        context = FlowRunContext.get()
        assert context is not None
        with tokenise.no_child_outlives_an_error():
            tokenise.units_through(context.task_runner, workers=workers)(function, units)

    pool = task_runner(runner, workers=workers, address=None)
    with tokenise.reachable_server():
        return some.with_options(task_runner=pool)(return_state=True)


def note(folder: Path, unit: Unit) -> None:
    """Leave a line for each call."""
    with (folder / f"{unit.domain}-{unit.task}").open("a") as file:
        file.write("called\n")


def noted(folder: Path) -> dict[str, int]:
    return {path.name: len(path.read_text().splitlines()) for path in folder.iterdir()}


def fail_once(folder: Path, unit: Unit) -> None:
    note(folder, unit)
    if unit == UNITS[7] and noted(folder)[f"{unit.domain}-{unit.task}"] == 1:
        raise OSError("the disk is full")


def fail(folder: Path, unit: Unit) -> None:
    note(folder, unit)
    if unit == UNITS[7]:
        raise CorpusError("domain prose: 9 of 9 records are bad")


def die(_: Unit) -> None:
    os._exit(9)


def wait_or_fail(folder: Path, unit: Unit) -> None:
    """The first unit fails when the second has begun, which then goes on for ever."""
    if unit.task:
        (folder / "pid.part").write_text(str(os.getpid()))
        (folder / "pid.part").rename(folder / "pid")
        threading.Event().wait()
    until((folder / "pid").exists, seconds=60)
    raise CorpusError("the first")


@pytest.fixture
def server_everywhere(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server for the threads too that pass on what worker processes report."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # a thread's batch would set it for the tests that follow
    monkeypatch.setattr(prefect.context, "GLOBAL_SETTINGS_CONTEXT", prefect.context.SettingsContext.get())


@pytest.mark.usefixtures("server_everywhere")
class TestUnits:
    def test_every_unit_is_run_once_in_so_many_task_runs_a_worker(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenise, "BATCHES", 2)
        state = share(partial(note, tmp_path), UNITS, runner="process")
        assert noted(tmp_path) == {f"{unit.domain}-{unit.task}": 1 for unit in UNITS}
        names = {f"scan {i + 1} of 4" for i in range(4)}
        # Names alone: events that meet in the server leave a run without a state now and then.
        until(lambda: {run["name"] for run in task_runs(state)} == names, seconds=60)

    def test_a_batch_whose_disk_was_full_is_run_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenise, "run_batch", tokenise.run_batch.with_options(retry_delay_seconds=0))
        share(partial(fail_once, tmp_path), UNITS).result()
        assert set(noted(tmp_path)) == {f"{unit.domain}-{unit.task}" for unit in UNITS}
        assert noted(tmp_path)["prose-7"] == 2

    def test_an_error_that_only_a_person_can_fix_arrives_as_it_was_raised_and_is_not_tried_again(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(CorpusError, match=r"^domain prose: 9 of 9 records are bad$"):
            share(partial(fail, tmp_path), UNITS).result()
        assert noted(tmp_path)["prose-7"] == 1

    def test_a_worker_that_is_killed_ends_the_run_with_what_to_do(self) -> None:
        with pytest.raises(CorpusError, match=r"a worker process was killed.*fewer --workers"):
            share(die, UNITS, runner="process", workers=1).result()

    def test_an_error_in_a_process_ends_those_that_are_still_busy(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match=r"^the first$"):
            share(partial(wait_or_fail, tmp_path), UNITS[:2], runner="process").result()
        assert not alive(int((tmp_path / "pid").read_text()))


class TestRunners:
    def test_a_missing_package_is_named_with_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "prefect_dask", None)
        with pytest.raises(RunnerError, match=r"needs prefect_dask: pip install 'moeforge\[dask\]'"):
            task_runner("dask", workers=2, address=None)

    def test_an_address_without_a_cluster_is_refused(self) -> None:
        with pytest.raises(RunnerError, match="set runner to dask, which is 'process'"):
            task_runner("process", workers=None, address="tcp://node1:8786")

    def test_workers_elsewhere_need_a_prefect_server_that_they_can_reach(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from prefect.settings import PREFECT_API_URL, temporary_settings

        pytest.importorskip("prefect_dask")
        for url in (None, "http://127.0.0.1:4200/api"):
            with (
                temporary_settings({PREFECT_API_URL: url} if url else None, restore_defaults={PREFECT_API_URL}),
                pytest.raises(RunnerError, match="set PREFECT_API_URL"),
            ):
                task_runner("dask", workers=None, address="tcp://node1:8786")
        with temporary_settings({PREFECT_API_URL: "http://head:4200/api"}):
            task_runner("dask", workers=None, address="tcp://node1:8786")

    def test_no_worker_at_all_is_refused(self) -> None:
        with pytest.raises(RunnerError, match="workers = 0 must be at least 1"):
            task_runner("process", workers=0, address=None)


CORPUS: dict[str, Any] = {
    "tokens": 4000,
    "sha256": "0",
    "domains": {
        "prose": {
            "documents": {"train": 80, "validation": 4, "test": 6},
            "tokens": {"train": 2500, "validation": 200, "test": 300},
            "rules": {"read": 120, "bad": 0, "empty": 0, "length.too_short": 24, "duplicate": 6, "kept": 90},
            "bytes_per_token": 3.219,
            "tokens_per_second": 900,
        },
        "code": {
            "documents": {"train": 8, "validation": 1, "test": 1},
            "tokens": {"train": 900, "validation": 50, "test": 50},
            "rules": {"read": 10, "bad": 0, "empty": 0, "duplicate": 0, "kept": 10},
            "bytes_per_token": 2.5,
            "tokens_per_second": 800,
        },
    },
}


ROWS = (
    {
        "domain": "prose", "documents": 90, "tokens": 3000, "share %": 75.0, "bytes/token": 3.22,
        "tokens/s": 900, "duplicate %": 5.0, "length.too_short %": 20.0,
    },
    {
        "domain": "code", "documents": 10, "tokens": 1000, "share %": 25.0, "bytes/token": 2.5,
        "tokens/s": 800, "duplicate %": 0.0, "length.too_short %": 0.0,
    },
)  # fmt: skip


class TestDomains:
    def test_rows_have_the_shares_of_tokens_and_of_records_dropped_by_each_rule_that_dropped_any(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        path = Path("data/corpora/tiny.json")
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(CORPUS))
        assert domains.rows([path]) == list(ROWS)
        assert domains.table("tiny").row_count == 2

    def test_metrics_of_other_stages_have_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        sources, other = Path("data/corpora/tiny.sources.json"), Path("runs/tiny/pretrain.json")
        for path in (sources, other):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"domains": {"prose": {}}}))
        assert domains.rows([sources, other, Path("data/corpora/absent.json")]) == []


class TestFlow:
    @pytest.mark.usefixtures("server", "dvc_in_process")
    def test_sources_and_model_come_first_then_the_units_then_the_stage_and_nothing_if_all_is_up_to_date(
        self, toy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def prepare(name: str, *, run: object) -> None:
            with Path("ran.txt").open("a") as file:
                file.write(f"prepare-{name}\n")

        monkeypatch.setattr(tokenise.stage, "prepare", prepare)
        (toy / "values" / "corpus").write_text(json.dumps(CORPUS))
        outcomes = tokenise.tokenise("toy", runner="thread")
        assert [outcome.name for outcome in outcomes if outcome.ran] == ["model@toy", "sources@toy", "corpus@toy"]
        order = ran(toy)
        assert (set(order[:2]), order[2:]) == ({"model", "sources"}, ["prepare-toy", "corpus"])
        assert dag.changes(["corpus@toy"]) == {"corpus@toy": []}
        assert json.loads(Artifact.get("corpus-toy").data) == list(ROWS)

        outcomes = tokenise.tokenise("toy", runner="thread")
        assert (ran(toy), [outcome.ran for outcome in outcomes]) == ([], [False] * 3)

    def test_it_can_be_deployed_from_its_entrypoint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        loaded = load_flow_from_entrypoint("flows/tokenise.py:tokenise")
        assert set(loaded.parameters.properties) == {"corpus", "runner", "workers", "address"}
