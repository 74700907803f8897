"""Sends the log's numbers to TensorBoard, Weights & Biases, MLflow and Trackio.

Each keeps its files in a folder of its name beside the log, and sends nothing over a network unless the user's own
variables say so: WANDB_MODE=online, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL. (Trackio asks the
Hugging Face hub for the name that belongs to a stored token, if HF_HUB_OFFLINE does not forbid it.)

accelerate's trackers are not used: none takes points back after a rollback or a kill, and the one for Weights & Biases
logs our step as wandb's own, which must not go back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tasks import scratch
from tasks.pretrain.job import TrainingError

PROJECT = "moeforge"
_TAG = "moeforge.run"


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run that a tracker shows."""

    folder: Path
    """The log's."""
    name: str
    """For people, such as the pipeline."""
    key: str
    """Distinguishes it, such as the pipeline and its workspace's fingerprint: letters, digits, - and _."""
    config: Mapping[str, Any]
    """The settings to show beside the curves."""

    @property
    def id(self) -> str:
        """The key and a random number, kept in run.json: a new run after a finished one gets another id."""
        path = self.folder / "run.json"
        if not path.exists():
            scratch.write_json(path, {"id": f"{self.key}-{uuid.uuid4().hex[:8]}"})
        return str(json.loads(path.read_text())["id"])


class Tracker:
    """Takes numbers by step. `write` may be called several times for a step, with other names."""

    rewinds: ClassVar[bool] = False
    """`rewind` and a later start take back what was written. If not, the caller must not write a point twice."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        raise NotImplementedError

    def rewind(self, step: int) -> None:
        """Training went back: what was written for steps after `step` is void, and will be written anew."""

    def flush(self) -> None: ...

    def close(self, *, failed: bool) -> None:
        """End the run; `failed`: by an error."""


def check(names: Sequence[str]) -> None:
    """Raise TrainingError if a tracker's package is not installed, saying how to get it."""
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise TrainingError(
            f"pretrain.trackers: {', '.join(missing)} not installed; `pip install 'moeforge[trackers]'`, or take "
            f"{'it' if len(missing) == 1 else 'them'} out of pretrain.trackers (training/log.jsonl has every number)"
        )


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder ./wandb of older runs is no package


def start(names: Sequence[str], run: Run, *, step: int) -> list[Tracker]:
    """Open a run with each tracker, or the interrupted one, to continue after step `step`.

    Raises:
        TrainingError: a package is missing, or its service refuses the run.
    """
    check(names)
    started: list[Tracker] = []
    for name in dict.fromkeys(names):
        (run.folder / name).mkdir(parents=True, exist_ok=True)
        try:
            started.append(_TRACKERS[name](run, step))
        except Exception as error:  # each package has errors of its own
            for before in started:
                before.close(failed=True)
            raise TrainingError(
                f"pretrain.trackers: {name} cannot start ({type(error).__name__}: {error}); fix that, or take it "
                "out of pretrain.trackers"
            ) from error
    return started


class TensorBoard(Tracker):
    """Event files. A later file's purge_step hides what earlier files have from that step on."""

    rewinds = True

    def __init__(self, run: Run, step: int) -> None:
        self._folder = run.folder / "tensorboard"
        self._open(step + 1 if step else 0)  # from 0, the first evaluation is done again too

    def _open(self, purge: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # With a short queue, each of a record's hundred numbers would wait for the thread that writes them.
        self._board = SummaryWriter(self._folder, purge_step=purge, max_queue=1000)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        self._board.close()
        self._open(step + 1)

    def flush(self) -> None:
        self._board.flush()

    def close(self, *, failed: bool) -> None:
        self._board.close()


class WandB(Tracker):
    """Weights & Biases, offline unless WANDB_MODE says otherwise; `wandb sync` sends the parts of a run in order.

    Its own step counts calls, so curves are drawn over ours. After a rollback both courses stay. kill -9 may cost the
    points of the last second.
    """

    def __init__(self, run: Run, step: int) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            dir=run.folder,
            config=dict(run.config),
            resume="allow",
            settings=wandb.Settings(
                console="off",
                silent=True,
                symlink=False,  # a copy of the folder would have the run twice
                x_transaction_log_flush_interval=1.0,
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow(Tracker):
    """MLflow, in an SQLite file beside the log unless MLFLOW_TRACKING_URI names a server.

    Every point is written at once (10 to 20 ms for 100 numbers in SQLite). After a rollback both courses stay.
    """

    def __init__(self, run: Run, step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run.folder / 'mlflow' / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], filter_string=f"tags.`{_TAG}` = '{run.id}'")
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment, run_name=run.name, tags={_TAG: run.id}).info.run_id
        for key, value in run.config.items():
            self._client.log_param(self._id, key, value)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in numbers.items()]
        for first in range(0, len(metrics), 1000):  # what a server takes at once
            self._client.log_batch(self._id, metrics=metrics[first : first + 1000])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class Trackio(Tracker):
    """Trackio, in an SQLite file beside the log unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set.

    After a rollback both courses stay. kill -9 may cost the points of the last half second.
    """

    def __init__(self, run: Run, step: int) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((run.folder / "trackio").resolve()))  # read when trackio is imported
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=PROJECT,
                name=run.id,
                config=dict(run.config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, *, failed: bool) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()


_TRACKERS: dict[str, Callable[[Run, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
