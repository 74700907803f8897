"""One training step of the sparse model against its dense parent, in the same loop; and of its pruned baseline.

    python -m bench.step PIPELINE [--steps 12] [--rounds 2] [--set batch=4] [--set micro_batch=4]

In a project whose stages up to `partition` have run. Each side is a worker of its own over the same batches, without
evaluations and checkpoints between; sides take turns. Printed: tokens/s by the median step without the first two, the
ratio that FLOPs alone would give, what the loop itself takes, and what a checkpoint holds up.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench import common
from tasks import settings
from tasks.control import training
from tasks.moe import counts
from tasks.pretrain.job import Job
from tasks.pretrain.log import log_file
from tasks.settings.pretrain import FIXED

GOAL = 0.85


def run(pipeline: str, model: Path, *, side: str, params: settings.Pretrain) -> tuple[list[dict[str, Any]], float]:
    """The step records of one side, and the seconds that it stood still for its checkpoints."""
    entry = settings.load().pipeline(pipeline)
    if side != "sparse":
        params = training.dense(params)
    workspace = Path(".scratch/bench-step") / side
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    job = Job(
        pipeline=pipeline,
        params=params,
        corpus=Path("data/corpora") / entry.corpus,
        model=model,
        parent=Path("data/models") / entry.model,
        mixture=Path("runs") / pipeline / "mixture.json",
        workspace=workspace,
    )
    subprocess.run(
        [sys.executable, "-m", "tasks.pretrain.launch.worker", str(job.write())], check=True, stdout=sys.stderr
    )
    saving = json.loads((workspace / "pretrain.json").read_text())["seconds_saving"]
    records = log_file.read(workspace / "training/log.jsonl", "step")
    shutil.rmtree(workspace)
    return records, saving


def median(records: list[dict[str, Any]], name: str) -> float:
    times: list[float] = [record["timing"][name] for record in records[2:]]
    return statistics.median(times)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("pipeline")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="field=value of pretrain, as YAML")
    arguments = parser.parse_args(argv)
    entry = settings.load().pipeline(arguments.pipeline)
    changes: dict[str, Any] = {
        "eval_tokens": 1 << 40, "eval_windows": 1, **FIXED, "warmup_tokens": 0,
        "save_every": max(3, arguments.steps // 2), "train": "all", "distill": None,
    }  # fmt: skip
    for pair in arguments.set:
        name, _, value = pair.partition("=")
        changes[name] = YAML(typ="safe").load(value)
    params = settings.Pretrain(**{**entry.pretrain.model_dump(), **changes})
    step_tokens = params.step_tokens
    params = params.model_copy(update={"tokens": arguments.steps * step_tokens})
    sides = {"dense": Path("data/models") / entry.model, "sparse": Path("runs") / arguments.pipeline / "moe"}
    if entry.pruned:
        sides["pruned"] = Path("runs") / arguments.pipeline / "control/split"
    steps: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    saving = dict.fromkeys(sides, 0.0)
    for _ in range(arguments.rounds):
        for side, model in sides.items():
            records, blocked = run(arguments.pipeline, model, side=side, params=params)
            steps[side] += records[2:]
            saving[side] += blocked
    flops = {
        side: counts.flops_per_token(json.loads((model / "config.json").read_text()), seq_len=entry.pretrain.seq_len)
        for side, model in sides.items()
    }
    speeds = {}
    for side, records in steps.items():
        seconds = {name: median(records, name) for name in ("seconds", "data", "forward", "backward", "optimizer")}
        speeds[side] = step_tokens / seconds["seconds"]
        own = seconds["seconds"] - sum(seconds[name] for name in ("forward", "backward", "optimizer"))
        parts = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items() if name != "seconds")
        print(
            f"{side}: {speeds[side]:.0f} tokens/s, step {seconds['seconds']:.3f} s ({parts}); loop's own "
            f"{100 * own / seconds['seconds']:.2f} %; checkpoints held up "
            f"{100 * saving[side] / arguments.rounds / (arguments.steps * seconds['seconds']):.1f} % of the run"
        )
    for side in list(sides)[1:]:
        bound = flops["dense"]["train"] / flops[side]["train"]
        ratio = speeds[side] / speeds["dense"]
        print(f"{side} / dense: {ratio:.2f} x; by FLOPs {bound:.2f} x: {ratio / bound:.2f} of it (goal {GOAL})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
