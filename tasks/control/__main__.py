"""Make the dense child of a pipeline: cut it from the parent, and train it as the sparse model was trained.

    python -m tasks.control PIPELINE

Reads data/models/<model>/, data/corpora/<corpus>/, runs/<pipeline>/mixture.json and, with dynamic batch loading, the
domain weights in runs/<pipeline>/training/. Writes runs/<pipeline>/control/ (model/: the trained child, split/: as it
was cut, training/: its log, loss.csv, validation.csv) and runs/<pipeline>/control.json. With `control: none` the
folder holds a marker alone. Stopped at any moment, even by kill -9, the same command goes on and ends with the same
bytes. A child that is there already, of the same inputs, settings and code, is left as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tasks import scratch, settings
from tasks.settings import Pipeline

MARKER = "made_from.json"


def run(pipeline: str) -> dict[str, Any]:
    """Run the stage and return the content of control.json.

    Raises:
        ValueError: the settings, the model and the corpus do not fit together; the proof of the cut failed.
        TrainingError, OSError, scratch.BusyError: with a message that says how to fix it.
    """
    entry = settings.load().pipeline(pipeline)
    return _nothing(pipeline) if entry.control == "none" else _dense_child(pipeline, entry)


def _nothing(pipeline: str) -> dict[str, Any]:
    target, metrics = Path("runs") / pipeline, {"control": "none"}
    with scratch.workspace("control", pipeline, inputs=metrics) as work:
        scratch.write_json(work / "control" / MARKER, metrics)
        scratch.publish(work / "control", target / "control")
        scratch.write_json(target / "control.json", metrics)
        shutil.rmtree(work)  # and with it what was begun of a child
    return metrics


def _dense_child(pipeline: str, entry: Pipeline) -> dict[str, Any]:
    from tasks import code
    from tasks.control import child
    from tasks.pretrain import inputs
    from tasks.pretrain.checkpoints import resume
    from tasks.pretrain.job import Job
    from tasks.pretrain.launch import launcher
    from tasks.pretrain.log import trackers

    target, parent = Path("runs") / pipeline, Path("data/models") / entry.model
    params = child.training(entry.pretrain)
    trackers.check(params.trackers)
    weights = _weights(target / "training/log.jsonl") if params.dynamic else {}
    made_from = {
        **inputs.digests(entry, model=parent, mixture=target / "mixture.json"),
        "weights": weights,
        "partition": entry.partition.model_dump(),
        "pretrain": params.model_dump(),
        "code": code.fingerprint("tasks.control"),
    }
    marker = {"control": "dense_child", "inputs": scratch.fingerprint(made_from)}
    with scratch.workspace("control", pipeline, inputs=made_from, priority=resume.last_step) as work:
        scratch.report_kept(work)
        if done := _published(target, marker):
            print(f"{target / 'control'}: made from the same inputs already, kept", flush=True)
            shutil.rmtree(work)
            return done
        cut = _cut(entry, parent, work=work)
        scratch.write_json(work / "weights.json", weights)
        job = Job(
            pipeline=f"{pipeline}.control",  # for trackers alone; no pipeline can be called so
            params=params,
            corpus=Path("data/corpora") / entry.corpus,
            model=work / "split",
            parent=parent,
            mixture=target / "mixture.json",
            workspace=work,
            weights=work / "weights.json" if params.dynamic else None,
        )
        launcher.run(job)
        metrics = marker | _metrics(cut, json.loads((work / "pretrain.json").read_text()))
        _assemble(work, marker)
        scratch.publish(work / "control", target / "control")
        scratch.write_json(target / "control.json", metrics)
        shutil.rmtree(work)
    return metrics


def _weights(log: Path) -> dict[int, dict[str, float]]:
    """Domain weights after each evaluation of the sparse model's training, by step. Raises ValueError without them."""
    from tasks.pretrain.log import log_file

    if not log.is_file():
        raise ValueError(
            f"{log}: not found; with pretrain.dynamic the sparse model's losses decide the batches, and its dense "
            "child gets the same: run the stage `pretrain` first"
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


def _cut(entry: Pipeline, parent: Path, *, work: Path) -> dict[str, Any]:
    """Write work/split, if an earlier start has not; returns what is known of it."""
    told = work / "cut.json"
    if (work / "split").is_dir():
        kept: dict[str, Any] = json.loads(told.read_text())
        return kept

    from tasks.display import Progress
    from tasks.moe import counts
    from tasks.partition import dense_child

    unfinished = work / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    layers = json.loads((parent / "config.json").read_text())["num_hidden_layers"]
    started = time.perf_counter()
    with Progress(layers, label="dense child", unit="layer") as progress:
        made = dense_child.cut(
            parent,
            Path("data/corpora") / entry.corpus,
            entry.partition,
            seq_len=entry.pretrain.seq_len,
            folder=unfinished,
            report=progress.advance,
        )
    config = json.loads((unfinished / "config.json").read_text())
    made |= {"seconds": round(time.perf_counter() - started, 1), "parameters": counts.parameters(config)["total"]}
    scratch.write_json(told, made)
    scratch.sync(unfinished)
    unfinished.rename(work / "split")
    return made


def _metrics(cut: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """The content of control.json: losses after the cut and after training, what both took, the curve."""
    of_cut = ("ffn_width", "parent_ffn_width", "parameters", "identity_error", "layer_error")
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
        **{name: cut[name] for name in of_cut},
        **{name: trained[name] for name in of_training},
        "loss": {
            moment: {**trained[f"validation_{when}"], "mean": trained[f"validation_mean_{when}"]}
            for moment, when in (("cut", "before"), ("trained", "after"))
        },
        "seconds": {"cut": cut["seconds"], "training": round(trained["seconds"], 1)},
    }


def _assemble(work: Path, marker: dict[str, Any]) -> None:
    """Make work/control of links to the results, so that a run killed in here can do it again."""
    from tasks.pretrain.job import JOB
    from tasks.pretrain.log.log_file import LOG

    folder = work / "control"
    shutil.rmtree(folder, ignore_errors=True)
    for source, name in ((work / "trained", "model"), (work / "split", "split")):
        (folder / name).mkdir(parents=True)
        for path in source.iterdir():
            scratch.link(path, folder / name / path.name)
    for name in ("loss.csv", "validation.csv"):
        scratch.link(work / name, folder / name)
    (folder / "training").mkdir()
    scratch.link(work / "training" / JOB, folder / "training" / JOB)
    records = map(json.loads, (work / "training" / LOG).read_text().splitlines())
    lines = (json.dumps({key: value for key, value in record.items() if key != "timing"}) for record in records)
    (folder / "training" / LOG).write_text("".join(f"{line}\n" for line in lines))  # the same whenever it is made
    scratch.write_json(folder / MARKER, marker)


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
        print(f"{pipeline} has no dense child (control: none)")
        return 0
    losses = metrics["loss"]
    print(
        f"dense child with {metrics['ffn_width']} of {metrics['parent_ffn_width']} neurons: validation loss "
        f"{losses['cut']['mean']:.3f} after the cut, {losses['trained']['mean']:.3f} after {metrics['tokens']:,} "
        "tokens of training"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
