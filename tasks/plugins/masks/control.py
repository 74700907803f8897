"""Builds a pruned baseline of any shape: which units stay, the cut, and before it the training of masks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tasks import scratch
from tasks.display import Progress
from tasks.moe import device
from tasks.moe.streamed import Streamed
from tasks.plugins.masks import cost, hard_concrete, module, settings, shrink, units
from tasks.pretrain.checkpoints import resume
from tasks.pretrain.job import Job
from tasks.pretrain.launch import launcher
from tasks.settings import Control, Pipeline

KEPT, MASKS = "kept.safetensors", "masks"
"""In the workspace: the factor of every unit, and the training of masks."""


def make(entry: Pipeline, control: Control, job: Job, *, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the pruned model's checkpoint into a new folder.

    Args:
        job: the training that it begins.
        config: the pruned model's config.json as the settings have it.

    Returns:
        layers: the parent's that are kept; identity_error; seconds by part; with masks, where their training came to.

    Raises:
        ValueError, TrainingError, OSError: with a message for the user.
    """
    sizes = settings.own(config)
    source, metrics = job.parent, dict[str, Any]()
    if control.method == "hard_concrete":
        masks = replace(
            job,
            pipeline=f"{job.pipeline}.masks",
            params=cost.mask_training(entry.pretrain, tokens=control.tokens),  # type: ignore[attr-defined]
            model=job.parent,
            workspace=job.workspace / MASKS,
            options={"masks": {"shape": sizes}},
        )
        source, metrics = masks.workspace / "trained", _train(masks)
    started = time.perf_counter()
    parent = Streamed(source, device=device.default())
    if control.method == "hard_concrete":
        keep = units.learned(source, sizes)
    elif control.method == "magnitude":
        keep = units.magnitude(parent, sizes)
    else:
        keep = units.random(parent.config, sizes, seed=entry.partition.seed)
    with Progress(sizes["num_hidden_layers"], label="pruned baseline", unit="layer") as progress:
        cut = shrink.cut(parent, keep, sizes, folder=folder, report=progress.advance)
    path = job.workspace / KEPT
    save_file({name: mask.float() for name, mask in vars(keep).items() if mask is not None}, path)
    path.chmod(0o644)  # safetensors writes 0600
    shutil.rmtree(job.workspace / MASKS / "checkpoints", ignore_errors=True)
    seconds = metrics.pop("seconds", {}) | {"cut": round(time.perf_counter() - started, 1)}
    return cut | metrics | {"seconds": seconds}


def steps(work: Path) -> int:
    """Steps of the training of masks that a workspace holds."""
    try:
        finished: int = json.loads((work / "cut.json").read_text()).get("masks", {}).get("steps", 0)
        return finished
    except FileNotFoundError:
        return resume.last_step(work / MASKS)


def publish(work: Path, folder: Path, *, link_training: Callable[[Path, Path], None]) -> None:
    """Link into the result which units were kept, and the log of the training of masks."""
    if (work / KEPT).exists():
        scratch.link(work / KEPT, folder / KEPT)
    if (work / MASKS).exists():
        link_training(work / MASKS, folder / MASKS)


def _train(job: Job) -> dict[str, Any]:
    """Train masks with the parent, from the last checkpoint if there is one; returns where they came to."""
    job.workspace.mkdir(exist_ok=True)
    launcher.run(job)
    trained = json.loads((job.workspace / "pretrain.json").read_text())
    logits = module.read(job.workspace / "trained")
    fields = {mask: field for field, mask in module.UNITS.items()}
    expected = {
        fields[mask]: round(float((1 - hard_concrete.absent(value)).mean()) * value.shape[-1], 3)
        for mask, value in logits.items()
    }
    masks: dict[str, Any] = {name: trained[name] for name in ("steps", "tokens", "domain_tokens")}
    masks["loss"] = {when: trained[f"validation_mean_{when}"] for when in ("before", "after")}
    masks["size"] = {
        field: {"expected": value, "target": job.options["masks"]["shape"][field]}
        for field, value in sorted(expected.items())
    }
    sizes = (f"{field} {size['expected']:g} for {size['target']}" for field, size in masks["size"].items())
    print(f"masks after {masks['tokens']:,} tokens: {', '.join(sizes)}", flush=True)
    return {"masks": masks, "seconds": {"masks": round(trained["seconds"], 1)}}
