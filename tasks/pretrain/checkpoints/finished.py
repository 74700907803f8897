"""What a finished run leaves with `keep_finished`, to be made longer, and how a run begins where another one was.

.scratch/finished-<pipeline>/<fingerprint of its inputs>/     the last finished run's; `--discard` deletes it
  inputs.json          digests of what it was trained from, and of the code
  checkpoints/         the last step's, from which it is published again; and the last one whose steps a longer run
                       has too (schedule.stable), from which it is made longer
  training/log.jsonl, rollbacks.json, job.json
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tasks import scratch
from tasks.pretrain import schedule
from tasks.pretrain.checkpoints import store
from tasks.pretrain.health import loss_guard
from tasks.pretrain.job import JOB, Job
from tasks.pretrain.log.log_file import LOG


def folder(pipeline: str) -> Path | None:
    """Where the last finished run's checkpoints are kept; None if there are none."""
    folders = [path for path in _root(pipeline).glob("*/") if store.steps(path / "checkpoints")]
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)


def keep(job: Job) -> None:
    """Turn the workspace of a run that is published into what is kept of it; the run kept before is deleted.

    Killed before the rename, a run starts again from its last checkpoint and is published again.
    """
    workspace, checkpoints, root = job.workspace, job.workspace / "checkpoints", _root(job.pipeline)
    if not job.params.keep_finished:
        shutil.rmtree(workspace.rename(workspace.with_name(f"done-{workspace.name}")))
        shutil.rmtree(root, ignore_errors=True)
        return
    steps = store.steps(checkpoints)
    for step in steps:
        if step not in (steps[-1], schedule.stable(job.params)):
            store.delete(checkpoints / store.tag(step))
    for parent, names in (
        (workspace, ("checkpoints", "training", "inputs.json", JOB, loss_guard.FILE)),
        (workspace / "training", (LOG,)),
    ):
        for path in parent.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    workspace.rename(root / workspace.name)


def discard(pipeline: str) -> list[int]:
    """Delete what is kept of the finished run; returns the steps of its checkpoints."""
    last_run = folder(pipeline)
    steps = store.steps(last_run / "checkpoints") if last_run else []
    shutil.rmtree(_root(pipeline), ignore_errors=True)
    return steps


def take(source: Path, workspace: Path, *, step: int) -> str | None:
    """Make of an empty workspace the one of a run that stopped right after `step` of another.

    The files of its checkpoint and of older ones are linked. Trackers are not taken over: they get the log from its
    start.

    Args:
        source: the other's workspace; its run may be going on.

    Returns:
        What is wrong with the checkpoint, if it is damaged; then nothing is taken.
    """
    checkpoints, log = workspace / "checkpoints", source / "training" / LOG
    staging = checkpoints / ".tmp-taken"
    shutil.rmtree(staging, ignore_errors=True)
    for at in store.steps(source / "checkpoints"):
        path = staging / store.tag(at)
        if at > step:
            continue
        try:
            shutil.copytree(source / "checkpoints" / path.name, path, copy_function=os.link)
            problem = store.damage(path, log=log)
        except (OSError, shutil.Error) as error:  # its run has deleted it
            problem = str(error)
        if problem:
            shutil.rmtree(path, ignore_errors=True)
            if at == step:
                return problem
    training, rollbacks = workspace / "training", workspace / loss_guard.FILE
    shutil.rmtree(training, ignore_errors=True)
    training.mkdir()
    with log.open("rb") as file:
        state = store.state(staging / store.tag(step))
        (training / LOG).write_bytes(file.read(state["log"]["bytes"]))
    rollbacks.unlink(missing_ok=True)
    if (source / loss_guard.FILE).exists():
        shutil.copyfile(source / loss_guard.FILE, rollbacks)
    for path in sorted(staging.iterdir()):
        path.rename(checkpoints / path.name)
    staging.rmdir()
    store.point(checkpoints, step)
    return None


def _root(pipeline: str) -> Path:
    return scratch.ROOT / f"finished-{pipeline}"
