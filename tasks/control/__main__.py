"""Build the pruned baseline of a pipeline: cut it from the parent, and train it as the sparse model was trained.

    python -m tasks.control PIPELINE

Reads data/models/<model>/, data/corpora/<corpus>/, runs/<pipeline>/mixture.json and, where evaluations move the domain
weights, those in runs/<pipeline>/training/. Writes runs/<pipeline>/control/ (model/: trained; split/: as it was cut;
training/: its log; loss.csv, validation.csv; parent/: the parent trained alike, if it is asked for; what a plug-in's
method adds) and runs/<pipeline>/control.json. With `control: none` the folder holds a marker alone. Stopped at any
moment, even by kill -9, the same command goes on and ends with the same bytes. A pruned baseline that is there
already, of the same inputs, settings and code, is left as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import plugin, scratch, settings
from tasks.settings import Control, Pipeline

if TYPE_CHECKING:
    from tasks.pretrain.job import Job

MARKER, SPLIT, PARENT, CUT = "made_from.json", "split", "parent", "cut.json"
"""Inside the workspace: what the result is made from, the pruned baseline before training, the training of the parent
and the figures of the cut."""
SHAPE = ("num_hidden_layers", "num_key_value_heads", "hidden_size", "intermediate_size", "num_attention_heads")


def run(pipeline: str) -> dict[str, Any]:
    """Run the stage and return the content of control.json.

    Raises:
        ValueError: the settings, the model and the corpus do not fit together; the proof of the cut failed.
        TrainingError, OSError, scratch.BusyError: with a message that says how to fix it.
    """
    entry = settings.load().pipeline(pipeline)
    return _pruned(pipeline, entry, entry.pruned) if entry.pruned else _nothing(pipeline)


def _nothing(pipeline: str) -> dict[str, Any]:
    target, metrics = Path("runs") / pipeline, {"control": "none"}
    with scratch.workspace("control", pipeline, inputs=metrics) as work:
        scratch.write_json(work / "control" / MARKER, metrics)
        scratch.publish(work / "control", target / "control")
        scratch.write_json(target / "control.json", metrics)
        shutil.rmtree(work)  # and with it what was begun
    return metrics


def _pruned(pipeline: str, entry: Pipeline, control: Control) -> dict[str, Any]:
    from tasks import code
    from tasks.control import training
    from tasks.pretrain import inputs
    from tasks.pretrain.job import Job
    from tasks.pretrain.launch import launcher
    from tasks.pretrain.log import trackers

    target, parent = Path("runs") / pipeline, Path("data/models") / entry.model
    params = training.dense(entry.pretrain)
    trackers.check(params.trackers)
    weights = _weights(target / "training/log.jsonl") if params.moves_weights else {}
    made_from = {
        **inputs.digests(entry, model=parent, mixture=target / "mixture.json"),
        "weights": weights,
        "control": control.model_dump(),
        "partition": entry.partition.model_dump(),
        "pretrain": params.model_dump(),
        "code": code.fingerprint("tasks.control"),
    }
    marker = {"control": "pruned", "inputs": scratch.fingerprint(made_from)}
    with scratch.workspace("control", pipeline, inputs=made_from, priority=_steps) as work:
        scratch.report_kept(work)
        if done := _published(target, marker):
            print(f"{target / 'control'}: made from the same inputs already, kept", flush=True)
            shutil.rmtree(work)
            return done
        job = Job(
            pipeline=f"{pipeline}.control",  # for trackers alone; no pipeline can be called so
            params=params,
            corpus=Path("data/corpora") / entry.corpus,
            model=work / SPLIT,
            parent=parent,
            mixture=target / "mixture.json",
            workspace=work,
            options={"weights": weights} if weights else {},
        )
        cut = _cut(entry, control, job)
        launcher.run(job)
        metrics = marker | _metrics(cut, _trained(work))
        if control.parent:
            alike = replace(job, pipeline=f"{pipeline}.parent", model=parent, workspace=work / PARENT)
            alike.workspace.mkdir(exist_ok=True)
            launcher.run(alike)
            trained = _trained(alike.workspace)
            metrics["seconds"]["parent"] = round(trained["seconds"], 1)
            metrics["parent"] = {
                "loss": _losses(trained, "after"), "tokens": trained["tokens"], "curve": trained["curve"]
            }  # fmt: skip
        _assemble(work, marker, method=control.method)
        scratch.publish(work / "control", target / "control")
        scratch.write_json(target / "control.json", metrics)
        shutil.rmtree(work)
    return metrics


def _weights(log: Path) -> dict[int, dict[str, float]]:
    """Domain weights after each evaluation of the sparse model's training, by step. Raises ValueError without them."""
    from tasks.pretrain.log import log_file

    if not log.is_file():
        raise ValueError(
            f"{log}: not found; the sparse model's losses decide the batches, and the "
            "pruned baseline gets the same: run the stage `pretrain` first"
        )
    return {record["step"]: record["weights"] for record in log_file.read(log, "validation")}


def _published(target: Path, marker: dict[str, Any]) -> dict[str, Any] | None:
    """control.json, if it and the folder are of these inputs."""
    try:
        there = json.loads((target / "control" / MARKER).read_text())
        metrics: dict[str, Any] = json.loads((target / "control.json").read_text())
    except (OSError, ValueError):
        return None
    return metrics if there == marker and metrics.get("inputs") == marker["inputs"] else None


def _cut(entry: Pipeline, control: Control, job: Job) -> dict[str, Any]:
    """Write the checkpoint that the training begins with, unless an earlier start has.

    Args:
        job: that training; its `model` is written.

    Returns:
        method, shape, parameters, identity_error, seconds by part, ffn_width, parent_ffn_width; what else the method
        has to say: layer_error of the closed form.

    Raises:
        ValueError, TrainingError, OSError: with a message for the user.
    """
    from tasks.moe import counts

    report = job.workspace / CUT
    if job.model.is_dir():
        earlier: dict[str, Any] = json.loads(report.read_text())
        return earlier
    unfinished = job.workspace / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    dense = json.loads((job.parent / "config.json").read_text())
    config = control.config(dense, entry.partition)
    started = time.perf_counter()
    if owner := plugin.owner("control.method", control.method):
        method = plugin.modules("control")[owner]
        cut: dict[str, Any] = method.make(entry, control, job, config=config, folder=unfinished)
    else:
        cut = _closed_form(entry, job, count=config["intermediate_size"], folder=unfinished)
    cut.setdefault("seconds", {"cut": round(time.perf_counter() - started, 1)})
    config = json.loads((unfinished / "config.json").read_text())
    cut |= {
        "method": control.method,
        "shape": {field: config[field] for field in SHAPE if field in config},
        "ffn_width": config["intermediate_size"],
        "parent_ffn_width": dense["intermediate_size"],
        "parameters": counts.parameters(config)["total"],
    }
    scratch.write_json(report, cut)
    scratch.sync(unfinished)
    unfinished.rename(job.model)
    return cut


def _closed_form(entry: Pipeline, job: Job, *, count: int, folder: Path) -> dict[str, Any]:
    from tasks.display import Progress
    from tasks.moe.streamed import Streamed
    from tasks.partition import pruned

    with Progress(Streamed(job.parent).layers, label="pruned baseline", unit="layer") as progress:
        cut = pruned.cut(
            job.parent,
            job.corpus,
            entry.partition,
            count=count,
            seq_len=entry.pretrain.seq_len,
            folder=folder,
            report=progress.advance,
        )
    return {name: cut[name] for name in ("layer_error", "identity_error")}


def _steps(work: Path) -> int:
    """Steps of training that a workspace holds, those before the cut too."""
    from tasks.pretrain.checkpoints import resume

    before: int = sum(module.steps(work) for module in plugin.modules("control").values())
    return resume.last_step(work) + before


def _metrics(cut: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """The content of control.json: losses after the cut and after training, what both took, the curve."""
    of_training = (
        "steps",
        "tokens",
        "domain_tokens",
        "tokens_per_second",
        "precision",
        "processes",
        "references",
        "curve",
    )
    return {
        **cut,
        **{name: trained[name] for name in of_training},
        "loss": {"cut": _losses(trained, "before"), "trained": _losses(trained, "after")},
        "seconds": {**cut["seconds"], "training": round(trained["seconds"], 1)},
    }


def _trained(work: Path) -> dict[str, Any]:
    """The metrics of a training."""
    content: dict[str, Any] = json.loads((work / "pretrain.json").read_text())
    return content


def _losses(trained: dict[str, Any], when: str) -> dict[str, float]:
    """Validation losses before or after a training, by domain and their mean."""
    return {**trained[f"validation_{when}"], "mean": trained[f"validation_mean_{when}"]}


def _assemble(work: Path, marker: dict[str, Any], *, method: str) -> None:
    """Make work/control of links to the results, so that a run killed in here can do it again."""
    folder = work / "control"
    shutil.rmtree(folder, ignore_errors=True)
    _training(work, folder)
    _link(work / "trained", folder / "model")
    _link(work / SPLIT, folder / "split")
    if owner := plugin.owner("control.method", method):
        plugin.modules("control")[owner].publish(work, folder, link_training=_training)
    if (work / PARENT).exists():
        _training(work / PARENT, folder / PARENT)
        _link(work / PARENT / "trained", folder / PARENT / "model")
    scratch.write_json(folder / MARKER, marker)


def _link(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        scratch.link(path, target / path.name)


def _training(source: Path, target: Path) -> None:
    """Link the log of a training into a new folder, the same whenever it is made: without timings."""
    from tasks.pretrain.job import JOB
    from tasks.pretrain.log.log_file import LOG

    (target / "training").mkdir(parents=True)
    for name in ("loss.csv", "validation.csv"):
        scratch.link(source / name, target / name)
    scratch.link(source / "training" / JOB, target / "training" / JOB)
    with (target / "training" / LOG).open("w") as log:
        for record in map(json.loads, (source / "training" / LOG).read_text().splitlines()):
            record.pop("timing", None)
            log.write(f"{json.dumps(record)}\n")


def main() -> int:
    """Run the stage for the pipeline named on the command line."""
    from tasks.pretrain.job import TrainingError

    parser = argparse.ArgumentParser(prog="python -m tasks.control", description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="a name under `pipelines` in pipelines.yaml")
    pipeline = parser.parse_args().pipeline
    try:
        metrics = run(pipeline)
    except (ValueError, TrainingError, OSError, scratch.BusyError) as error:
        print(f"control {pipeline}: {error}", file=sys.stderr)
        return 1
    if metrics["control"] == "none":
        print(f"{pipeline} has no pruned baseline (control: none)")
        return 0
    losses = metrics["loss"]
    print(
        f"pruned baseline with {metrics['ffn_width']} of {metrics['parent_ffn_width']} neurons: validation loss "
        f"{losses['cut']['mean']:.3f} after the cut, {losses['trained']['mean']:.3f} after {metrics['tokens']:,} "
        "tokens of training"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
