"""Which unfinished work a start continues, and which settings it may change.

Unfinished work belongs to its inputs: the converted model, the mixture, the corpus. Other inputs are a new start.
Other settings continue only a run that they would have given from the start, up to rounding and to which random
numbers are drawn; else they are refused by name. The same rule says whether a finished run is made longer or
published again (finished.py), or whether a run begins where another pipeline's was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks import scratch
from tasks.pretrain import job, schedule
from tasks.pretrain.checkpoints import finished, store
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain

STAGE = "pretrain"
INPUTS = "inputs.json"

_ALWAYS = frozenset(
    {
        "launcher",  # who starts the processes
        "hostfile",
        "save_every",  # what is written, and where to
        "keep",
        "keep_every",
        "keep_finished",
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
_UNSEEN = _COURSE | {"launcher", "hostfile", "save_every", "keep", "keep_every", "keep_finished", "trackers"}
"""What leaves no trace in the results, if it is safe."""
NAMES = {"model": "the converted model", "mixture": "the mixture", "corpus": "the corpus"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting that differs from the one a checkpoint was written with."""

    field: str
    old: Any
    new: Any

    @property
    def shows(self) -> bool:
        """Whether the results may show the change, if only by rounding."""
        return self.field.split(".")[0] not in _UNSEEN

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
    before = unfinished(pipeline)
    with scratch.workspace(STAGE, pipeline, inputs=inputs, priority=last_step) as folder:
        notes = [_aside(other, step, inputs) for other, step in before.items() if other != folder]
        state = store.find(folder / "checkpoints")
        code = job.code_digest()
        mixed = state is not None and read_inputs(folder).get("code") != code
        scratch.write_json(folder / INPUTS, {**inputs, "code": "" if mixed else code})
        if state:
            changed = admit(state, params, pipeline=pipeline, older=_goes_back(folder, params))
            notes += [f"going on from step {state['step']} with {change}" for change in changed]
        elif last_run := finished.folder(pipeline):
            notes += _from_finished(last_run, folder, params=params, pipeline=pipeline)
        elif notes:
            notes.append("starting anew")
        yield folder, notes


def _from_finished(last_run: Path, folder: Path, *, params: Pretrain, pipeline: str) -> list[str]:
    """Go on from a finished run if it may be, in a workspace without a checkpoint; returns what to say."""
    note = f"the finished run's checkpoints are kept in {last_run} until this run is finished"
    if last_run.name != folder.name:
        before = read_inputs(last_run)
        named = [name for key, name in NAMES.items() if before.get(key) != read_inputs(folder)[key]]
        return [f"starting anew: {', '.join(named)} changed since the last run was finished; {note}"]
    if read_inputs(last_run).get("code") != read_inputs(folder)["code"]:
        way = f"`python -m tasks.pretrain {pipeline} --branch {pipeline}` goes on from them nevertheless"
        return [f"starting anew: the last run was finished by other code; {note}, and {way}"]
    notes: list[str] = []
    refused = ""
    for step in reversed(store.steps(last_run / "checkpoints")):
        path = last_run / "checkpoints" / store.tag(step)
        problem = store.damage(path, content=False)
        if problem is None:
            state = store.state(path)
            changed, refusal = compare(state, params)
            if refusal:
                refused = refused or refusal
                continue
            problem = finished.take(last_run, folder, step=step)
        if problem is None:
            left = params.steps - step
            way = f"with {left} steps to train" if left else "which is published again: no step is left to train"
            return [*notes, f"going on from step {step} of the finished run, {way}", *map(str, changed)]
        notes.append(f"{path} is damaged: {problem}")
    why = f" is not the one that these settings give ({refused})" if refused else " cannot be gone on with"
    return [*notes, f"starting anew: the finished run{why}; {note}"]


def admit(state: dict[str, Any], params: Pretrain, *, pipeline: str, older: int | None = None) -> list[Change]:
    """The settings that have changed since a checkpoint, all of them safe.

    Args:
        state: the checkpoint's, with `step` and `params`.
        older: the step of an older one, of which they are safe.

    Raises:
        TrainingError: not all are safe; it lists those that are not and says how to go on.
    """
    changed, refusal = compare(state, params)
    if refusal:
        ways = "Either set them back" if changed else "Either go on with the code that wrote it"
        if older is not None:
            ways += (
                f", or go back to step {older}, from which they may change: `python -m tasks.pretrain {pipeline} "
                f"--branch {pipeline} --step {older}`"
            )
        raise TrainingError(
            f"the unfinished run of {pipeline} (step {state['step']}) cannot go on with other settings: {refusal}. "
            f"{ways}, or give the work up: `python -m tasks.pretrain {pipeline} --discard`; then run again"
        )
    return changed


def compare(state: dict[str, Any], params: Pretrain) -> tuple[list[Change], str]:
    """The settings that have changed since a checkpoint, and those that are not safe, for a message."""
    try:
        old = Pretrain(**state["params"])
    except (KeyError, ValidationError) as error:
        return [], f"it was written by code with other settings ({_first(error)})"
    changed = changes(old, params)
    return changed, "; ".join(str(change) for change in changed if not _safe(change, old, params, step=state["step"]))


def _goes_back(folder: Path, params: Pretrain) -> int | None:
    """The newest step but the last whose checkpoint the settings fit."""
    for step in reversed(store.steps(folder / "checkpoints")[:-1]):
        path = folder / "checkpoints" / store.tag(step)
        if not store.damage(path, content=False) and not compare(store.state(path), params)[1]:
            return step
    return None


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
    """Delete the unfinished work of a pipeline, or if there is none what is kept of the finished run.

    Returns:
        What to tell the user.

    Raises:
        scratch.BusyError: it is being worked on.
    """
    runs = unfinished(pipeline)
    with scratch.workspace(STAGE, pipeline, inputs="discarded") as folder:  # which deletes all others
        folder.rmdir()
        if not runs and (steps := finished.discard(pipeline)):
            return f"deleted what was kept of the finished training of {pipeline}: step {', '.join(map(str, steps))}"
    if not runs:
        return f"{pipeline} has no unfinished training"
    more = ". The finished run's checkpoints are still kept; again with --discard, they go" * bool(
        finished.folder(pipeline)
    )
    return f"deleted the unfinished training of {pipeline} up to step {max(runs.values())}{more}"


def unfinished(pipeline: str) -> dict[Path, int]:
    """Workspaces with a checkpoint, and the step of the newest."""
    folders = (scratch.ROOT / f"{STAGE}-{pipeline}").glob("*/checkpoints")
    return {path.parent: step for path in folders if (step := last_step(path.parent))}


def _safe(change: Change, old: Pretrain, new: Pretrain, *, step: int) -> bool:
    field = change.field.split(".")[0]
    if field in _ALWAYS:
        return True
    if field == "eval_tokens":
        return not new.moves_weights
    if field not in _COURSE:
        return False
    if old.steps != new.steps and step >= min(old.steps, new.steps):  # after its last step a run is evaluated
        return False
    return all(schedule.share(at, old) == schedule.share(at, new) for at in range(1, step + 1))


def last_step(folder: Path) -> int:
    """The step of a workspace's newest checkpoint; 0 without one."""
    return max(store.steps(folder / "checkpoints"), default=0)


def _aside(other: Path, step: int, inputs: dict[str, str]) -> str:
    """What to say of an unfinished run with other inputs."""
    before = read_inputs(other)
    named = ", ".join(NAMES[name] for name in inputs if before.get(name) != inputs[name]) if before else "an input"
    run = f"{named} changed since step {step} of an unfinished run"
    if not other.exists():
        return f"{run}, which was deleted: one such run is kept, the longest"
    return (
        f"{run}, which is kept in {other} until this one is finished. With its inputs back it goes on; `--discard` "
        "deletes both"
    )


def read_inputs(folder: Path) -> dict[str, str]:
    """Digests of what a workspace's run is trained from; {} if that is not known."""
    try:
        inputs: dict[str, str] = json.loads((folder / INPUTS).read_text())
    except (OSError, ValueError):
        return {}
    return inputs


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
