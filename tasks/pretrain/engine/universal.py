"""Loading a checkpoint, also one of another world size or optimizer, by DeepSpeed's universal checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.pretrain import trainable
from tasks.pretrain.job import TrainingError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def load(engine: DeepSpeedEngine, folder: Path, *, name: str, universal: bool) -> None:
    """Load folder/name into the engine. Raises TrainingError if DeepSpeed finds nothing there."""
    # The configuration says how the first is read; a later one, after a rollback, may be of this world size.
    engine._config.load_universal_checkpoint = universal
    groups = [_hyperparameters(group) for group in engine.basic_optimizer.param_groups]
    with trainable.all_phases(engine):
        path, _ = engine.load_checkpoint(str(folder), tag=name, load_lr_scheduler_states=False)
    if path is None:
        raise TrainingError(f"{folder / name}: DeepSpeed cannot load this checkpoint")
    if universal and engine.zero_optimization_partition_weights():
        for group, own in zip(engine.basic_optimizer.param_groups, groups, strict=True):
            group.update(own)
        _count_steps(engine.optimizer, Path(folder / name / "zero/optimizer_state.pt"))


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _count_steps(optimizer: Any, path: Path) -> None:
    """Give every group of a ZeRO-3 optimizer its own count of steps.

    DeepSpeed 0.19.8 loads the first group's hyperparameters into all, and the first state's step counter, one and the
    same tensor, which then counts every group's steps: the bias correction of the moments goes wrong from there on.
    """
    from tasks.pretrain.engine import checkpoint_writer

    saved = checkpoint_writer.load(path)["optimizer_state_dict"]
    steps = [saved["state"][group["params"][0]]["step"] for group in saved["param_groups"]]
    for part, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.optimizer.state[flat]["step"] = steps[optimizer.sub_group_to_group_id[part]].clone()


def across(engine: DeepSpeedEngine, folder: Path, *, state: dict[str, Any], rank: int) -> None:
    """Load a checkpoint that another number of processes, or another optimizer, wrote; all ranks must call it.

    Rank 0 converts it; the masters and the Adam moments come out bit for bit.
    """
    import torch

    target = folder / f".tmp-universal-{state['tag']}"
    if rank == 0:
        convert(folder / state["tag"], target)
    while not target.exists():  # longer than a collective may wait
        time.sleep(0.1)
    load(engine, folder, name=target.name, universal=True)
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(target)


def convert(source: Path, target: Path) -> None:
    """Write the universal form of a checkpoint, whole or not at all.

    It is read with pickle, so the source must be one that this machine wrote.

    Raises:
        TrainingError: a full disk, or a checkpoint that cannot be converted.
    """
    from deepspeed.checkpoint import ds_to_universal

    staging = target.with_name(f"{target.name}.part")
    for path in (staging, target):
        shutil.rmtree(path, ignore_errors=True)
    arguments = argparse.Namespace(
        input_folder=str(source), output_folder=str(staging), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ds_to_universal.main(arguments)
    except (OSError, RuntimeError, AssertionError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise TrainingError(f"{source} could not be converted for these settings: {error}") from error
    finally:
        (target.parent / "latest_universal").unlink(missing_ok=True)  # its pointer, which nobody reads
    staging.rename(target)
