"""Healing: how much of the gap between the split and the dense parent each recipe closes in the same tokens.

    python -m bench.healing FOLDER [--tokens 102400] [--seeds 0] [--only NAME ...] [--jobs 2]

Makes a project in FOLDER: the model `smollm2-135m-q4` and the corpus `demo` of pipelines.yaml,
two splits at half of the FFN active (ours, and LLaMA-MoE's random one), and a pipeline for each recipe and seed. Runs
the stages, two trainings next to each other on a core each, and prints a table. Killed, it goes on where it was.
The seed decides the batches and, for the random split, the partition.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench import common

MODEL, CORPUS = "smollm2-135m-q4", "demo"
OURS = {
    "method": "activation",
    "experts": 144,
    "shared_experts": 48,
    "top_k": 48,
    "down_proj": "refit",
    "fit_passes": 2,
    "calibration_windows": 80,
}
UPSTREAM = {"method": "random", "experts": 8, "top_k": 4, "scale": "paper", "gate": "tanh"}
TRAINING = {
    "seq_len": 512,
    "batch": 1,
    "micro_batch": 1,
    "learning_rate": 2e-4,
    "warmup_tokens": 4096,
    "eval_windows": 2,
    "save_every": 50,
}
SLOW_ROUTER = {"learning_rates": {"router": 4e-7}}
RECIPES: dict[str, dict[str, Any]] = {
    "plain, router at the common rate": {},
    "plain": SLOW_ROUTER,
    "distillation without cross-entropy": {**SLOW_ROUTER, "distill": {"cross_entropy": 0.0, "logits": 1.0}},
    "distillation": {**SLOW_ROUTER, "distill": {"logits": 1.0}},
    "plain, router warm-up": {
        "learning_rates": {"router": 4e-6},
        "train": [{"what": "router", "tokens": 8192}, {"what": "all"}],
    },
    "plain, dynamic weights": {**SLOW_ROUTER, "dynamic": {"rule": "paper"}},
    "upstream": {"balance": {"loss": "cv2", "coefficient": 0.01}},
    "dense": {},
}
"""What differs from TRAINING. Upstream's gate is made with noise. `dense` trains the parent in the same way: what it
gains is the text's doing, and the rest of what a recipe gains is healing."""


def key_of(name: str, seed: int) -> str:
    return f"{'dense' if name == 'dense' else f'r{list(RECIPES).index(name)}'}-{seed}"


def pipelines(recipes: list[str], seeds: list[int], *, tokens: int) -> dict[str, dict[str, Any]]:
    """Key -> pipeline."""
    made = {}
    for name in recipes:
        for seed in seeds:
            split = UPSTREAM | {"seed": seed} if name == "upstream" else OURS
            made[key_of(name, seed)] = {
                "model": MODEL,
                "corpus": CORPUS,
                "mixture": {"method": "reference_loss", "windows": 8},
                "partition": split,
                "pretrain": {
                    **TRAINING,
                    "tokens": tokens,
                    "eval_tokens": max(tokens // 8, 1),
                    "seed": seed,
                    **RECIPES[name],
                },
                "evaluate": {"seq_len": 512, "windows": 8, "batch": 4},
            }
    return made


def prepare(folder: Path, made: dict[str, dict[str, Any]]) -> None:
    """The project: code by links, and pipelines.yaml with the pipelines."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tasks", "kernels", "flows"):
        link = folder / name
        if not link.exists():
            link.symlink_to(common.ROOT / name)
    yaml = YAML(typ="safe", pure=True)
    base = yaml.load((common.ROOT / "pipelines.yaml").read_text())
    content = {"models": {MODEL: base["models"][MODEL]}, "corpora": {CORPUS: base["corpora"][CORPUS]}}
    with (folder / "pipelines.yaml").open("w") as file:
        yaml.dump({**content, "pipelines": made}, file)


def stage(name: str, *arguments: str, folder: Path) -> None:
    log = folder / "log" / f"{name}-{'-'.join(arguments)}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, "-m", f"tasks.{name}", *arguments],
            cwd=folder, env=common.environment(folder, OMP_NUM_THREADS="1"), stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} {' '.join(arguments)} failed: {log}")
    print(f"done: {name} {' '.join(arguments)}", file=sys.stderr, flush=True)


def run(folder: Path, made: dict[str, dict[str, Any]], *, jobs: int) -> None:
    """All stages up to `pretrain`, of what isn't there yet. Equal splits are made once."""
    if not (folder / "data/models" / MODEL / "config.json").exists():
        stage("moe.dense", MODEL, folder=folder)
        stage("corpus.fingerprint", CORPUS, folder=folder)
        stage("corpus", CORPUS, folder=folder)
    splits: dict[str, str] = {}
    for key, pipeline in made.items():
        root = folder / "runs" / key
        there = (root / "moe/config.json").exists()
        if key.startswith("dense"):
            if not there:
                stage("mixture", key, folder=folder)
                shutil.copytree(folder / "data/models" / MODEL, root / "moe", copy_function=os.link)
            continue
        first = splits.setdefault(json.dumps(pipeline["partition"]), key)
        if there:
            continue
        if first == key:
            stage("mixture", key, folder=folder)
            stage("partition", key, folder=folder)
        else:
            root.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / "runs" / first / "mixture.json", root / "mixture.json")
            shutil.copytree(folder / "runs" / first / "moe", root / "moe", copy_function=os.link)
    left = [key for key in made if not (folder / "runs" / key / "pretrain.json").exists()]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda key: stage("pretrain", key, folder=folder), left))


def table(folder: Path, recipes: list[str], seeds: list[int]) -> None:
    """Mean (and range over the seeds) of what each recipe closed of the gap in loss, and its curve."""
    print("| recipe | loss of the parent | after the split | trained | gap closed, % | tokens/s | curve |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for name in recipes:
        figures: list[tuple[float, ...]] = []
        curves: list[list[float]] = []
        for seed in seeds:
            root = folder / "runs" / key_of(name, seed)
            ran = json.loads((root / "pretrain.json").read_text())
            parent = statistics.mean(ran["references"].values())
            before, after = ran["validation_mean_before"], ran["validation_mean_after"]
            rows = [line.split(",") for line in (root / "validation.csv").read_text().splitlines()[1:]]
            curves.append([float(row[2]) for row in rows])
            closed = math.nan if name == "dense" else 100 * (before - after) / (before - parent)
            figures.append((parent, before, after, closed, ran["tokens_per_second"]))
        parent, before, after, closed, speed = (statistics.mean(column) for column in zip(*figures, strict=True))
        shares = [row[3] for row in figures]
        spread = f" ({min(shares):.1f} to {max(shares):.1f})" if len(shares) > 1 else ""
        curve = " ".join(f"{statistics.mean(point):.3f}" for point in zip(*curves, strict=True))
        print(f"| {name} | {parent:.3f} | {before:.3f} | {after:.3f} | {closed:.1f}{spread} | {speed:.0f} | {curve} |")


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=102400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="runs next to each other")
    arguments = parser.parse_args(argv)
    folder = arguments.folder.resolve()
    made = pipelines(arguments.only, arguments.seeds, tokens=arguments.tokens)
    prepare(folder, made)
    run(folder, made, jobs=arguments.jobs)
    table(folder, arguments.only, arguments.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
