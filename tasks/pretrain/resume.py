"""Which unfinished work a start goes on with, and what it may change.

Unfinished work belongs to its inputs: the split model, the mixture, the corpus. Other inputs are a new start. Other
settings are taken over only if the run that goes on is the one that the new settings would have given from the start,
up to rounding and to which random numbers are drawn; else they are refused by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks import scratch
from tasks.pretrain import checkpoint_files, schedule
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain

STAGE = "pretrain"

_ALWAYS = frozenset(
    {
        "launcher",  # who starts the processes
        "hostfile",
        "save_every",  # what is written, and where to
        "keep",
        "keep_every",
        "trackers",
        "expert_log",
        "guard",  # what follows a step that went wrong; sound steps are the same
        "gradient_checkpointing",  # the same products, computed again
        "offload",  # where the optimizer's states lie
        "precision",  # a checkpoint is held to its dtype, whatever it is called, when it is loaded
        # How a step's windows are shared out. Cross-entropy and distillation are means over the step's predicted
        # tokens, whoever computes them (`objective`); a balance loss of each micro-batch sees other groups of windows,
        # and noise is drawn anew.
        "processes",
        "micro_batch",
    }
)
_COURSE = frozenset({"tokens", "schedule", "warmup_tokens", "decay_share", "final_lr_share"})
"""Safe as long as every step so far had the learning rate that the new settings give it."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting that differs from the one a checkpoint was written with."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"pretrain.{self.field}: {_shown(self.old)} -> {_shown(self.new)}"


@contextmanager
def workspace(pipeline: str, *, params: Pretrain, inputs: dict[str, str]) -> Iterator[tuple[Path, list[str]]]:
    """Hold the workspace of a pipeline's training, as scratch.workspace does.

    Args:
        inputs: digests of what is trained from.

    Yields:
        The folder, and lines for the user: what was taken over, or what was dropped.

    Raises:
        TrainingError: there is unfinished work from these inputs with settings that cannot be taken over.
        scratch.BusyError: another process holds it.
    """
    current = scratch.fingerprint(inputs)
    others = {folder.name: step for folder, step in _unfinished(pipeline) if folder.name != current}
    with scratch.workspace(STAGE, pipeline, inputs=inputs) as folder:
        notes = [
            f"the split model, the mixture or the corpus has changed since step {step} of the unfinished run; "
            "starting anew"
            for step in others.values()
        ]
        if state := checkpoint_files.find(folder / "checkpoints"):
            changed = admit(state, params, pipeline=pipeline)
            notes += [f"going on from step {state['step']} with {change}" for change in changed]
        yield folder, notes


def admit(state: dict[str, Any], params: Pretrain, *, pipeline: str) -> list[Change]:
    """The settings that have changed since a checkpoint, all of them safe.

    Args:
        state: the checkpoint's, with `step` and `params`.

    Raises:
        TrainingError: not all are safe; it lists those that are not and says how to go on.
    """
    step = state["step"]
    try:
        old = Pretrain(**state["params"])
    except (KeyError, ValidationError) as error:
        raise TrainingError(
            f"the unfinished run of {pipeline} (step {step}) was written by code with other settings and cannot be "
            f"continued by this one ({_first(error)}). {_ways_on(pipeline, 'go on with the code that wrote it')}"
        ) from None
    found = changes(old, params)
    if refused := [change for change in found if not _safe(change, old, params, step=step)]:
        raise TrainingError(
            f"the unfinished run of {pipeline} (step {step}) cannot go on with other settings: "
            f"{'; '.join(map(str, refused))}. {_ways_on(pipeline, 'set them back')}"
        )
    return found


def changes(old: Pretrain, new: Pretrain) -> list[Change]:
    """What differs, by dotted field, in the order of the settings."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    fields = dict.fromkeys([*before, *after])
    return [
        Change(field=field, old=before.get(field), new=after.get(field))
        for field in fields
        if before.get(field) != after.get(field)
    ]


def discard(pipeline: str) -> str:
    """Delete the unfinished work of a pipeline; returns what to tell the user.

    Raises:
        scratch.BusyError: it is being worked on.
    """
    found = _unfinished(pipeline)
    with scratch.workspace(STAGE, pipeline, inputs="discarded") as folder:  # which deletes all others
        shutil.rmtree(folder)
    if not found:
        return f"{pipeline} has no unfinished training"
    return f"deleted the unfinished training of {pipeline} up to step {max(step for _, step in found)}"


def _safe(change: Change, old: Pretrain, new: Pretrain, *, step: int) -> bool:
    field = change.field.split(".")[0]
    if field in _ALWAYS:
        return True
    if field == "eval_tokens":
        return new.dynamic is None  # else evaluations move the weights
    if field not in _COURSE or (new.distill and new.distill.top_n):  # whose shards are those of so many tokens
        return False
    return step < new.steps and all(schedule.share(at, old) == schedule.share(at, new) for at in range(1, step + 1))


def _unfinished(pipeline: str) -> list[tuple[Path, int]]:
    """Workspaces with a checkpoint, and its step."""
    found = []
    for pointer in (scratch.ROOT / f"{STAGE}-{pipeline}").glob("*/checkpoints/latest.json"):
        if steps := checkpoint_files.steps(pointer.parent):
            found.append((pointer.parent.parent, steps[-1]))
    return found


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{name}.")
        else:
            flat[prefix + name] = item
    return flat


def _shown(value: Any) -> str:
    return "absent" if value is None else json.dumps(value)


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return f"{error.args[0]} is missing"


def _ways_on(pipeline: str, way: str) -> str:
    return f"Either {way}, or give the work up: `python -m tasks.pretrain {pipeline} --discard`, then run again"
