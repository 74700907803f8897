"""What `moeforge plan` estimates of a training run against the run: peak memory of a process, seconds of a step.

    python -m bench.estimate [--model tiny demo] [--setting NAME …] [--threads 1]

The stage trains a model with random weights (`tiny`, or the demo's split of SmolLM2-135M, with the shapes of
pipelines.yaml) for six steps with a checkpoint every second one, on a corpus that is made here. Memory is estimated
from the settings alone, a step's time by `--calibrate`'s run just before the stage. Truths: the largest resident set
of any process of the stage, and the median of the log's steps from the third on, without those after a checkpoint,
which wait for its copies.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import common

STEPS = 6
BASE: dict[str, Any] = {"precision": "bfloat16", "seq_len": 512, "batch": 2, "micro_batch": 2, "learning_rate": 2e-4}
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {"precision": "float32"},
    "bf16, recomputed": {"gradient_checkpointing": True},
    "fp32, recomputed": {"precision": "float32", "gradient_checkpointing": True},
    "bf16, accumulated": {"micro_batch": 1},
    "bf16, ZeRO 0": {"zero_stage": 0},
    "bf16, ZeRO 2": {"zero_stage": 2},
    "bf16, ZeRO 3": {"zero_stage": 3},
    "bf16, 2 processes": {"processes": 2, "micro_batch": 1},
    "bf16, 2 processes, ZeRO 2": {"processes": 2, "micro_batch": 1, "zero_stage": 2},
    "bf16, 2 processes, ZeRO 3": {"processes": 2, "micro_batch": 1, "zero_stage": 3},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=["tiny", "demo"], default=["tiny", "demo"])
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        project = prepare(Path(folder))
        print(f"{'model':5} {'setting':26} {'peak, MB':>22}       {'step, s':>18}")
        for model in args.model:
            put_model(project, model)
            for setting in args.setting:
                row(project, model, setting)


def row(project: Path, model: str, setting: str) -> None:
    from tasks.settings import Pretrain
    from tasks.tools import calibrate, estimate

    fields = BASE | SETTINGS[setting]
    fields |= {"tokens": STEPS * fields["batch"] * fields["seq_len"], "save_every": 2, "eval_windows": 1}
    params = Pretrain(**fields)
    config = json.loads((project / "runs/tiny/moe/config.json").read_text())
    memory = estimate.memory(config, params, bfloat16=params.precision == "bfloat16").host_total
    before = os.getloadavg()[0]
    step = calibrate.measure(config, params).step(params)
    peak, steps = train(project, fields)
    load = f"load {before:.1f} to {os.getloadavg()[0]:.1f}"
    print(
        f"{model:5} {setting:26} {memory / 1e6:8.0f} {peak / 1e6:8.0f} {memory / peak:6.2f}   "
        f"{step:8.2f} {steps:8.2f} {step / steps:6.2f}   {load}",
        flush=True,
    )


def train(project: Path, fields: dict[str, Any]) -> tuple[int, float]:
    """Run the stage. Returns the peak resident set of its largest process, in bytes, and the seconds of a step."""
    from tests.pretrain.projects import configure

    shutil.rmtree(project / ".scratch", ignore_errors=True)
    path = project / "pipelines.yaml"
    path.write_text((project / "pipelines.template").read_text())
    configure(project, **fields)
    measured = f"import os, resource, subprocess, sys; code = subprocess.call([{sys.executable!r}, '-m', "
    measured += "'tasks.pretrain', 'tiny'], stdout=sys.stderr); "
    measured += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", measured], cwd=project, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    log = (project / "runs/tiny/training/log.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, log) if record["kind"] == "step"]
    plain = [record["timing"]["seconds"] for record in steps if record["step"] > 2 and record["step"] % 2 == 0]
    return int(done.stdout), statistics.median(plain)


def prepare(folder: Path) -> Path:
    """A project whose stages up to `mixture` have run, with a small model's tokenizer."""
    from tests import conftest

    project, data = folder / "project", folder / "data"
    project.mkdir()
    data.mkdir()
    conftest._train_tiny(folder / "dense")
    for domain in ("prose", "code"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in conftest.documents(domain))
        (data / f"{domain}.jsonl").write_text(lines)
    for name in ("tasks", "kernels"):
        shutil.copytree(common.ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = conftest.SETTINGS.format(model=folder / "dense", data=data).replace(".jsonl.gz", ".jsonl")
    text = text.replace("      dynamic: {rule: paper}\n", "").replace("      warmup_tokens: 256\n", "")
    (project / "pipelines.template").write_text(text)
    (project / "pipelines.yaml").write_text(text)
    for name in ("moe.dense", "corpus.fingerprint", "corpus", "mixture"):
        line = [sys.executable, "-m", f"tasks.{name}", "tiny"]
        done = subprocess.run(line, cwd=project, env=common.environment(project), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    return project


def put_model(project: Path, name: str) -> None:
    """Write runs/tiny/moe: random weights of the demo's split, or of a small model, with the project's tokenizer."""
    import torch

    from flows import plan
    from tasks import settings
    from tasks.tools import calibrate

    config = settings.load(common.ROOT / "pipelines.yaml")
    demo = config.pipeline("demo")
    sparse = plan.sparse_config(plan.dense_config(config, demo.model), demo.partition)
    if name == "tiny":
        small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 8,
                 "num_experts_per_tok": 2, "shared_intermediate_size": 128, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 512, "attention_multiplier": 0.25}  # fmt: skip
        sparse = {key: value for key, value in sparse.items() if key != "layer_types"} | small
    folder = project / "runs/tiny/moe"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(project / "data/models/tiny", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    model = calibrate.random_model(sparse, dtype=torch.bfloat16, device=torch.device("cpu"))
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
