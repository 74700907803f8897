"""The cut of a dense child, by the method of `control`: the closed form, or the units that masks or baselines keep."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import scratch
from tasks.control import child
from tasks.pretrain.checkpoints import resume
from tasks.pretrain.job import Job
from tasks.settings import Control, Pipeline

if TYPE_CHECKING:
    from tasks.moe.internals.masked import Keep

SPLIT, KEPT, MASKS = "split", "kept.safetensors", "masks"
"""In the workspace: the child as it was cut, the factor of every unit, and the training of masks."""


def make(entry: Pipeline, control: Control, job: Job) -> dict[str, Any]:
    """Write the checkpoint that a child's training begins with, if an earlier start has not.

    Args:
        job: that training; its `model` is written.

    Returns:
        method, shape, parameters, identity_error, seconds, ffn_width, parent_ffn_width; layer_error of the closed
        form; layers, the parent's that are kept, of the others; masks, where their training came to.

    Raises:
        ValueError, TrainingError, OSError: with a message for the user.
    """
    told = job.workspace / "cut.json"
    if job.model.is_dir():
        kept: dict[str, Any] = json.loads(told.read_text())
        return kept

    from tasks.display import Progress
    from tasks.moe import counts

    unfinished = job.workspace / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    dense = json.loads((job.parent / "config.json").read_text())
    sizes = control.sizes(dense, entry.partition)
    masks = replace(
        job,
        pipeline=f"{job.pipeline}.masks",
        params=child.masks(entry.pretrain, tokens=control.tokens or 0),
        model=job.parent,
        workspace=job.workspace / MASKS,
        weights=None,
        shape=sizes,
    )
    trained = _train(masks) if control.method == "hard_concrete" else {}
    started = time.perf_counter()
    with Progress(sizes["num_hidden_layers"], label="dense child", unit="layer") as progress:
        if control.method == "static":
            made = _closed_form(entry, job, sizes, folder=unfinished, report=progress.advance)
        else:
            source = masks.workspace / "trained" if trained else job.parent
            made = _chosen(entry, control, sizes, source=source, folder=unfinished, report=progress.advance)
    config = json.loads((unfinished / "config.json").read_text())
    made |= {
        "method": control.method,
        "shape": {field: config[field] for field in (*sizes, "num_attention_heads")},
        "ffn_width": sizes["intermediate_size"],
        "parent_ffn_width": dense["intermediate_size"],
        "parameters": counts.parameters(config)["total"],
        "seconds": round(time.perf_counter() - started, 1),
        **trained,
    }
    scratch.write_json(told, made)
    scratch.sync(unfinished)
    unfinished.rename(job.model)
    shutil.rmtree(masks.workspace / "checkpoints", ignore_errors=True)
    return made


def steps(work: Path) -> int:
    """Steps of training that a workspace holds, of masks and of the child."""
    try:
        masks = json.loads((work / "cut.json").read_text()).get("masks", {}).get("steps", 0)
    except FileNotFoundError:
        masks = resume.last_step(work / MASKS)
    return int(masks) + resume.last_step(work)


def _closed_form(
    entry: Pipeline, job: Job, sizes: dict[str, int], *, folder: Path, report: Callable[[str], None]
) -> dict[str, Any]:
    from tasks.partition import dense_child

    made = dense_child.cut(
        job.parent,
        job.corpus,
        entry.partition,
        count=sizes["intermediate_size"],
        seq_len=entry.pretrain.seq_len,
        folder=folder,
        report=report,
    )
    return {name: made[name] for name in ("layer_error", "identity_error")}


def _chosen(
    entry: Pipeline,
    control: Control,
    sizes: dict[str, int],
    *,
    source: Path,
    folder: Path,
    report: Callable[[str], None],
) -> dict[str, Any]:
    from tasks.control import shrink, units
    from tasks.moe import device
    from tasks.moe.streamed import Streamed

    parent = Streamed(source, device=device.default())
    if control.method == "hard_concrete":
        keep = units.learned(source, sizes)
    elif control.method == "magnitude":
        keep = units.magnitude(parent, sizes)
    else:
        keep = units.random(parent.config, sizes, seed=entry.partition.seed)
    made = shrink.cut(parent, keep, sizes, folder=folder, report=report)
    _write(keep, folder.parent / KEPT)
    return made


def _train(job: Job) -> dict[str, Any]:
    """Train masks with the parent, from the last checkpoint if there is one; returns where they came to."""
    from tasks.pretrain.launch import launcher
    from tasks.pretrain.masks import hard_concrete, module

    assert job.shape is not None
    job.workspace.mkdir(exist_ok=True)
    launcher.run(job)
    trained = json.loads((job.workspace / "pretrain.json").read_text())
    logits = module.read(job.workspace / "trained")
    fields = {mask: field for field, mask in module.UNITS.items()}
    expected = {
        fields[mask]: round(float((1 - hard_concrete.absent(value)).mean()) * value.shape[-1], 3)
        for mask, value in logits.items()
    }
    masks: dict[str, Any] = {name: trained[name] for name in ("steps", "tokens", "domain_tokens", "seconds")}
    masks["loss"] = {when: trained[f"validation_mean_{when}"] for when in ("before", "after")}
    masks["size"] = {
        field: {"expected": value, "target": job.shape[field]} for field, value in sorted(expected.items())
    }
    return {"masks": masks}


def _write(keep: Keep, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: mask.float() for name, mask in vars(keep).items() if mask is not None}, path)
    path.chmod(0o644)  # safetensors writes 0600
