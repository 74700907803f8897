"""What a step of a run was trained on.

    moeforge inspect runs/PIPELINE --step N

A finished run is read from runs/<pipeline>/training; without one, the unfinished run under .scratch/ is, as far as its
log goes. Each evaluation in the log has the sampler's state, so a step costs the same wherever it lies.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks import scratch
from tasks.corpus.tokenizer import encoder
from tasks.pretrain.job import JOB, Job, TrainingError
from tasks.tools import batch_trace

SHOWN = 200  # characters of each document


def step(run: Path, number: int, *, full: bool = False) -> dict[str, Any]:
    """The global batch of step `number` (from 1) as JSON values, slot by slot.

    Args:
        run: runs/<pipeline>, or `trained` in it.
        full: the whole text and ids, not each document's beginning.

    Raises:
        TrainingError: no run is there, or it has no such step.
        ValueError: the corpus has changed since.
    """
    training, record = _find(run)
    job = Job.read(record)
    last, at, state = _state(training / "log.jsonl", number)
    if not 1 <= number <= last or state is None:
        steps = f"steps 1 to {last}" if last else "no step yet"
        raise TrainingError(f"{training / 'log.jsonl'}: has {steps}; there is no step {number} to show")
    params = job.params
    drawn = state["step"] + number - at  # after a rollback the sampler is further than the steps
    slots = batch_trace.batch(job.corpus, state, step=drawn, seq_len=params.seq_len, packing=params.packing)
    decode = encoder.load_encoder(job.model).decode if job.model.exists() else None
    return {
        "run": str(training.parent),
        "pipeline": job.pipeline,
        "step": number,
        "steps": params.steps,
        "steps_logged": last,
        "corpus": str(job.corpus),
        "corpus_sha256": state["corpus_sha256"],
        "seq_len": params.seq_len,
        "packing": params.packing,
        "mask_documents": params.mask_documents,
        "weights": {d: w / sum(state["weights"]) for d, w in zip(state["domains"], state["weights"], strict=True)},
        "slots": batch_trace.describe(slots, decode=decode, characters=None if full else SHOWN),
    }


def _find(run: Path) -> tuple[Path, Path]:
    """The folder of a run's log and the record of its job."""
    root = run.parent if run.name == "trained" else run
    if (root / "training/log.jsonl").exists():
        if not (root / "training" / JOB).exists():
            raise TrainingError(
                f"{root / 'training' / JOB}: not found; the run was made before steps could be replayed: "
                f"run the stage `pretrain` of {root.name} again"
            )
        return root / "training", root / "training" / JOB
    jobs = scratch.ROOT.glob(f"pretrain-{root.resolve().name}/*/{JOB}")
    newest = max(jobs, key=lambda path: path.stat().st_mtime, default=None)  # others are kept with other inputs
    if newest is not None and (newest.parent / "training/log.jsonl").exists():
        return newest.parent / "training", newest
    raise TrainingError(
        f"{run}: no run is there; give runs/PIPELINE of a pipeline whose stage `pretrain` has run or is running"
    )


def _state(log: Path, number: int) -> tuple[int, int, dict[str, Any] | None]:
    """The last step in the log, and the last step before `number` that has the sampler's state, with that state.

    Evaluations have it, and so have rollbacks, which change what is drawn next.
    """
    step_line, at, state = b"", 0, None
    with log.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # being written
                break
            if line.startswith(b'{"kind": "step"'):
                step_line = line
            elif (record := json.loads(line))["step"] < number and "sampler" in record:
                at, state = record["step"], record["sampler"]
    return json.loads(step_line)["step"] if step_line else 0, at, state
