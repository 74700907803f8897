"""Make the dense child of a pipeline: cut it from the parent, and train it as the sparse model was trained.

    python -m tasks.control PIPELINE

Reads data/models/<model>/, data/corpora/<corpus>/, runs/<pipeline>/mixture.json and, with dynamic batch loading, the
domain weights in runs/<pipeline>/training/. Writes runs/<pipeline>/control/ (model/: the trained child, split/: as it
was cut, training/: its log, loss.csv, validation.csv; masks/: the same of their training; kept.safetensors: which
units the child has, unless it was cut by the closed form; parent/: the parent trained alike, if it is asked for) and
runs/<pipeline>/control.json. With `control: none` the folder holds a marker alone. Stopped at any moment, even by
kill -9, the same command goes on and ends with the same bytes. A child that is there already, of the same inputs,
settings and code, is left as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks import scratch, settings
from tasks.settings import Control, Pipeline

MARKER, PARENT = "made_from.json", "parent"


def run(pipeline: str) -> dict[str, Any]:
    """Run the stage and return the content of control.json.

    Raises:
        ValueError: the settings, the model and the corpus do not fit together; the proof of the cut failed.
        TrainingError, OSError, scratch.BusyError: with a message that says how to fix it.
    """
    entry = settings.load().pipeline(pipeline)
    return _dense_child(pipeline, entry, entry.child) if entry.child else _nothing(pipeline)


def _nothing(pipeline: str) -> dict[str, Any]:
    target, metrics = Path("runs") / pipeline, {"control": "none"}
    with scratch.workspace("control", pipeline, inputs=metrics) as work:
        scratch.write_json(work / "control" / MARKER, metrics)
        scratch.publish(work / "control", target / "control")
        scratch.write_json(target / "control.json", metrics)
        shutil.rmtree(work)  # and with it what was begun of a child
    return metrics


def _dense_child(pipeline: str, entry: Pipeline, control: Control) -> dict[str, Any]:
    from tasks import code
    from tasks.control import child, cuts
    from tasks.pretrain import inputs
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
        "control": control.model_dump(),
        "partition": entry.partition.model_dump(),
        "pretrain": params.model_dump(),
        "code": code.fingerprint("tasks.control"),
    }
    marker = {"control": "dense_child", "inputs": scratch.fingerprint(made_from)}
    with scratch.workspace("control", pipeline, inputs=made_from, priority=cuts.steps) as work:
        scratch.report_kept(work)
        if done := _published(target, marker):
            print(f"{target / 'control'}: made from the same inputs already, kept", flush=True)
            shutil.rmtree(work)
            return done
        scratch.write_json(work / "weights.json", weights)
        job = Job(
            pipeline=f"{pipeline}.control",  # for trackers alone; no pipeline can be called so
            params=params,
            corpus=Path("data/corpora") / entry.corpus,
            model=work / cuts.SPLIT,
            parent=parent,
            mixture=target / "mixture.json",
            workspace=work,
            weights=work / "weights.json" if params.dynamic else None,
        )
        cut = cuts.make(entry, control, job)
        launcher.run(job)
        metrics = marker | _metrics(cut, _trained(work))
        if control.parent:
            alike = replace(job, pipeline=f"{pipeline}.parent", model=parent, workspace=work / PARENT)
            alike.workspace.mkdir(exist_ok=True)
            launcher.run(alike)
            made = _trained(alike.workspace)
            metrics["seconds"]["parent"] = round(made["seconds"], 1)
            metrics["parent"] = {"loss": _losses(made, "after"), "tokens": made["tokens"], "curve": made["curve"]}
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


def _metrics(cut: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """The content of control.json: losses after the cut and after training, what both took, the curve."""
    masks = cut.get("masks")
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
        **{name: cut[name] for name in cut if name not in ("seconds", "masks")},
        **{name: trained[name] for name in of_training},
        "loss": {"cut": _losses(trained, "before"), "trained": _losses(trained, "after")},
        "seconds": {
            **({"masks": round(masks["seconds"], 1)} if masks else {}),
            "cut": cut["seconds"],
            "training": round(trained["seconds"], 1),
        },
        **({"masks": {name: value for name, value in masks.items() if name != "seconds"}} if masks else {}),
    }


def _trained(work: Path) -> dict[str, Any]:
    """The metrics of a training."""
    content: dict[str, Any] = json.loads((work / "pretrain.json").read_text())
    return content


def _losses(trained: dict[str, Any], when: str) -> dict[str, float]:
    """Validation losses before or after a training, by domain and their mean."""
    return {**trained[f"validation_{when}"], "mean": trained[f"validation_mean_{when}"]}


def _assemble(work: Path, marker: dict[str, Any]) -> None:
    """Make work/control of links to the results, so that a run killed in here can do it again."""
    from tasks.control import cuts

    folder = work / "control"
    shutil.rmtree(folder, ignore_errors=True)
    _training(work, folder)
    _link(work / "trained", folder / "model")
    _link(work / cuts.SPLIT, folder / "split")
    if (work / cuts.KEPT).exists():
        scratch.link(work / cuts.KEPT, folder / cuts.KEPT)
    if (work / cuts.MASKS).exists():
        _training(work / cuts.MASKS, folder / cuts.MASKS)
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
        print(f"{pipeline} has no dense child (control: none)")
        return 0
    losses = metrics["loss"]
    if masks := metrics.get("masks"):
        sizes = (f"{field} {size['expected']:g} for {size['target']}" for field, size in masks["size"].items())
        print(f"masks after {masks['tokens']:,} tokens: {', '.join(sizes)}")
    print(
        f"dense child with {metrics['ffn_width']} of {metrics['parent_ffn_width']} neurons: validation loss "
        f"{losses['cut']['mean']:.3f} after the cut, {losses['trained']['mean']:.3f} after {metrics['tokens']:,} "
        "tokens of training"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
