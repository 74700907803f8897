"""Checkpoints that are whole or invisible, and exact resume.

    checkpoints/
      latest.json            {"tag": …}, replaced in one rename once everything under the tag is on the disk
      step-00000016/         DeepSpeed's files, state.json (rank 0's loop state) and rng-<rank>.json
      .tmp-step-00000032/    one being written, or left by a crash; deleted at the next start

DeepSpeed reads its own files back with pickle; they never leave this machine's scratch folder.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import scratch
from tasks.pretrain.job import TrainingError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

KEEP = 2


def save(engine: DeepSpeedEngine, folder: Path, *, state: dict[str, Any], rank: int) -> None:
    """Write the checkpoint of `state["step"]`; all ranks must call it.

    Args:
        folder: checkpoints/.
        state: the loop's state, JSON-able, the same on every rank.

    Raises:
        TrainingError: it could not be written (a full disk); the previous checkpoint is as it was.
    """
    import torch

    tag = f"step-{state['step']:08}"
    staging = folder / f".tmp-{tag}"
    try:
        engine.save_checkpoint(str(folder), tag=staging.name, save_latest=False)
        scratch.write_json(staging / f"rng-{rank}.json", _rng_state())
        if rank == 0:
            scratch.write_json(staging / "state.json", state)
        torch.distributed.barrier()
        if rank == 0:
            _commit(folder, staging, tag)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        last = find(folder)
        kept = f"the checkpoint of step {last['step']} is whole" if last else "no checkpoint was written before"
        free = shutil.disk_usage(folder).free
        raise TrainingError(
            f"the checkpoint of step {state['step']} could not be written to {folder} ({error}; {free / 1e9:.1f} GB "
            f"free); {kept}. Make room and run again: training goes on from it"
        ) from error
    torch.distributed.barrier()


def _commit(folder: Path, staging: Path, tag: str) -> None:
    for path in staging.rglob("*"):
        _fsync(path)
    _fsync(staging)
    final = folder / tag
    if final.exists():  # left by a crash between this rename and the pointer's
        shutil.rmtree(final)
    staging.rename(final)
    _fsync(folder)
    scratch.write_json(folder / "latest.json", {"tag": tag})
    _fsync(folder)
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)


def find(folder: Path) -> dict[str, Any] | None:
    """The state of the last whole checkpoint, with its `tag`; None if there is none."""
    pointer = folder / "latest.json"
    if not pointer.exists():
        return None
    tag = json.loads(pointer.read_text())["tag"]
    state: dict[str, Any] = json.loads((folder / tag / "state.json").read_text())
    return {**state, "tag": tag}


def clean(folder: Path) -> None:
    """Delete what a crash left: half-written checkpoints, and whole ones that the pointer does not know yet."""
    found = find(folder)
    for path in [*folder.glob(".tmp-*"), *folder.glob("step-*")]:
        if path.name.startswith(".tmp-") or found is None or path.name > found["tag"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_world_size(state: dict[str, Any], world_size: int) -> None:
    """Raise TrainingError if the checkpoint was written by another number of processes."""
    if state["world_size"] != world_size:
        raise TrainingError(
            f"the checkpoint of step {state['step']} was written by {state['world_size']} processes and "
            f"pretrain.processes is {world_size} now; optimizer states are sharded by process. Set pretrain.processes "
            f"to {state['world_size']} to go on, or delete the stage's folder under {scratch.ROOT}/ to start over"
        )


def restore(engine: DeepSpeedEngine, folder: Path, *, tag: str, rank: int) -> None:
    """Load weights, optimizer and this rank's random states; all ranks must call it."""
    path, _ = engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
    if path is None:
        raise TrainingError(f"{folder / tag}: DeepSpeed could not load this checkpoint; delete {folder} to start over")
    _set_rng_state(json.loads((folder / tag / f"rng-{rank}.json").read_text()))


def _rng_state() -> dict[str, Any]:
    import torch

    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()},
    }


def _set_rng_state(saved: dict[str, Any]) -> None:
    import torch

    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    states = {
        name: torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for name, text in saved["torch"].items()
    }
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
