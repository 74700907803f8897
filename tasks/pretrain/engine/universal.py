"""Loading a checkpoint, also one of another world size or optimizer, by DeepSpeed's universal checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.pretrain.engine import optimizer
from tasks.pretrain.job import TrainingError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
"""What a checkpoint of ZeRO 1 or 2 must hold to be converted."""


def load(engine: DeepSpeedEngine, folder: Path, *, is_universal: bool) -> None:
    """Load a checkpoint into the engine. Raises TrainingError if DeepSpeed finds nothing there."""
    # The configuration says how the first is read; a later one, after a rollback, may be of this world size.
    engine._config.load_universal_checkpoint = is_universal
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in engine.basic_optimizer.param_groups
    ]
    with optimizer.all_phases(engine):
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    if path is None:
        raise TrainingError(f"{folder}: DeepSpeed cannot load this checkpoint")
    if is_universal and engine.zero_optimization_partition_weights():
        for group, own in zip(engine.basic_optimizer.param_groups, groups, strict=True):
            group.update(own)
        _count_steps(engine.optimizer, folder / "zero/optimizer_state.pt")


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


def load_converted(engine: DeepSpeedEngine, folder: Path) -> None:
    """Load a checkpoint that another number of processes, or another optimizer, wrote; all ranks must call it.

    Rank 0 converts it; the fp32 weights and the Adam moments come out bit for bit.
    """
    import torch

    first = torch.distributed.get_rank() == 0
    target = folder.with_name(f".tmp-universal-{folder.name}")
    if first:
        convert(folder, target)
    while not target.exists():  # longer than a collective may wait
        time.sleep(0.1)
    load(engine, target, is_universal=True)
    torch.distributed.barrier()
    if first:
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
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            ds_to_universal.main(arguments)
    except (OSError, RuntimeError, AssertionError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise TrainingError(f"{source} could not be converted for these settings: {error}") from error
    finally:
        (target.parent / "latest_universal").unlink(missing_ok=True)  # its pointer, which nobody reads
    staging.rename(target)
