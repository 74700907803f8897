"""Each tracker's own files, read back by its own package, after a run that was killed, went on and rolled back."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.pretrain.job import TrainingError
from tasks.pretrain.log import trackers
from tasks.pretrain.log.log_file import LogFile

ROOT = Path(__file__).parents[3]
RUN = """
import os, signal, sys, time
from pathlib import Path
from tasks.pretrain.log.log_file import LogFile
from tasks.pretrain.log.trackers import Run

name, offset, first, last = sys.argv[1], *map(int, sys.argv[2:5])
config = {"batch": 4, "balance": {"loss": "switch"}, "train": [{"what": "router", "tokens": None}]}
run = Run(folder=Path("training"), name="demo", key="demo-0123abcd", config=config)
log = LogFile(run, names=[name], offset=offset, step=first)
if not first:
    log.write({"kind": "validation", "step": 0, "tokens": 0, "mean": 3.0, "losses": {"books": 3.5}})
for step in range(first + 1, last + 1):
    layers = {"peak": [0.5, 0.25]}
    log.write({"kind": "step", "step": step, "tokens": step * 8, "loss": 1 / step, "experts": {"layers": layers}})
    if step == 2:
        print(log.sync()["bytes"], flush=True)
"""
KILLED = "time.sleep(2.5 if name in {'wandb', 'trackio'} else 0); os.kill(os.getpid(), signal.SIGKILL)"
DONE = "log.close()"
Points = list[tuple[int, float]]


def tensorboard(folder: Path) -> dict[str, Points]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def mlflow(folder: Path) -> dict[str, Points]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.resolve()}/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("moeforge").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["batch"]) == ("demo", "FINISHED", "4")
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def trackio(folder: Path) -> dict[str, Points]:
    import json
    import sqlite3

    with sqlite3.connect(folder / "trackio" / "moeforge.db") as base:
        rows = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    result: dict[str, Points] = {}
    for _, step, metrics in rows:
        for name, value in json.loads(metrics).items():
            result.setdefault(name, []).append((step, value))
    return result


def wandb(folder: Path) -> dict[str, Points]:
    import json

    result: dict[str, Points] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for record in _transactions(path.read_bytes()):
            if record.WhichOneof("record_type") == "run":
                assert (record.run.project, record.run.display_name) == ("moeforge", "demo")
                assert record.run.run_id.startswith("demo-0123abcd-")
            if record.WhichOneof("record_type") != "history":
                continue
            items = {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            step = items.pop("step")
            for name, value in items.items():
                if not name.startswith("_"):
                    result.setdefault(name, []).append((step, value))
    return result


def _transactions(raw: bytes) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    at, data = 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, part = struct.unpack_from("<IHB", raw, at)
        data += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if part in {1, 4}:  # whole, or last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            data = b""
            yield record


READERS: list[Callable[[Path], dict[str, Points]]] = [tensorboard, mlflow, trackio, wandb]


def training(folder: Path, name: str, *, end: str, resumed: tuple[int, int] = (0, 0), last: int) -> str:
    """One process of a run; returns what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR", "WANDB_DIR"):
        env.pop(variable, None)
    line = [sys.executable, "-c", RUN + end, name, *map(str, resumed), str(last)]
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if end == KILLED else 0), done.stderr
    return done.stdout


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_run_that_was_killed_goes_on_in_the_same_run_with_every_point_once(
    read: Callable[[Path], dict[str, Points]], tmp_path: Path
) -> None:
    name = read.__name__
    pytest.importorskip(name)
    printed = training(tmp_path, name, end=KILLED, last=4)
    assert printed.split()[0].isdigit(), "nothing but what the program prints"
    offset = int(printed.split()[0])
    training(tmp_path, name, end=DONE, resumed=(offset, 2), last=6)
    result = read(tmp_path / "training")
    assert result["step/loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 7)]
    assert result["step/experts/layers/peak/1"] == [(step, 0.25) for step in range(1, 7)]
    assert result["validation/losses/books"] == [(0, 3.5)]
    linked = [path for path in (tmp_path / "training").rglob("*") if path.is_symlink() and path.is_dir()]
    assert not linked, "a copy of the folder would have it twice"
    assert {path.name for path in tmp_path.iterdir()} - {"training", ".cache", ".config"} == set()


def test_a_rollback_hides_what_it_takes_back_where_the_tracker_can(tmp_path: Path) -> None:
    run = trackers.Run(folder=tmp_path, name="demo", key="demo-1", config={})
    log = LogFile(run, names=["tensorboard"], offset=0, step=0)
    log.write({"kind": "step", "step": 1, "loss": 1.0})
    offset = log.sync()["bytes"]
    log.write({"kind": "step", "step": 2, "loss": 99.0})
    log.rewind(offset=offset, step=1)
    log.write({"kind": "step", "step": 2, "loss": 0.5})
    log.close()
    assert tensorboard(tmp_path)["step/loss"] == [(1, 1.0), (2, 0.5)]


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = trackers._installed
    monkeypatch.setattr(trackers, "_installed", lambda name: name != "mlflow" and known(name))
    trackers.check(["tensorboard"])
    with pytest.raises(TrainingError, match=r"trackers: mlflow not installed; `pip install 'moeforge\[trackers\]'`"):
        trackers.check(["tensorboard", "mlflow"])


def test_a_folder_of_older_runs_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackrecord").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not trackers._installed("trackrecord")
    assert trackers._installed("json")


def test_a_service_that_refuses_is_named_and_the_others_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    opened = types.SimpleNamespace(close=lambda failed: closed.append(("tensorboard", failed)))

    def refuse(run: trackers.Run, step: int) -> trackers.Tracker:
        raise ConnectionError("no route to tracking.example")

    monkeypatch.setattr(trackers, "check", lambda names: None)
    monkeypatch.setattr(trackers, "_TRACKERS", {"tensorboard": lambda run, step: opened, "mlflow": refuse})
    run = trackers.Run(folder=tmp_path, name="demo", key="demo-1", config={})
    with pytest.raises(TrainingError, match=r"mlflow cannot start \(ConnectionError: no route to tracking\.example\)"):
        trackers.start(["tensorboard", "mlflow"], run, step=0)
    assert closed == [("tensorboard", True)]


def test_a_run_keeps_its_id_until_its_folder_goes(tmp_path: Path) -> None:
    run = trackers.Run(folder=tmp_path / "training", name="demo", key="demo-1", config={})
    assert run.id == trackers.Run(folder=run.folder, name="demo", key="demo-1", config={}).id
    (run.folder / "run.json").unlink()
    before = run.id
    (run.folder / "run.json").unlink()
    assert run.id != before
