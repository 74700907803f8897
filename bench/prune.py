"""Pruning: what a dense child of one shape loses whose units are chosen by trained masks, by magnitude, or at random.

    python -m bench.prune FOLDER [--shape num_hidden_layers=24 hidden_size=480] [--masks 40960] [--tokens 24576]
                                 [--seeds 0] [--only NAME ...]

Makes a project in FOLDER: the model `smollm2-135m-q4` and the corpus `demo` of pipelines.yaml, and a pipeline for each
row and seed, whose stage `control` cuts the parent and trains the child. All rows heal on the same batches. Rows with
`+` heal on as many tokens as masks and healing of `hard_concrete` take together. Killed, it goes on where it was.
The seed decides the batches, the draws of the masks, and the units of `random`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import common, healing

ROWS = ("hard_concrete", "magnitude", "random", "magnitude +", "random +")
SHAPE = {"num_hidden_layers": 24, "num_key_value_heads": 2, "hidden_size": 480, "intermediate_size": 1024}
"""About half of the parent's parameters."""


def key_of(row: str, seed: int) -> str:
    return f"{row.replace(' +', '-longer').replace('_', '-')}-{seed}"


def pipelines(
    rows: Sequence[str], seeds: Sequence[int], *, shape: Mapping[str, int], masks: int, tokens: int
) -> dict[str, dict[str, Any]]:
    """Key -> pipeline."""
    made = {}
    for row in rows:
        for seed in seeds:
            longer, method = row.endswith("+"), row.removesuffix(" +")
            total = tokens + (masks if longer else 0)
            control: dict[str, Any] = {"method": method, "shape": dict(shape)}
            made[key_of(row, seed)] = {
                "model": healing.MODEL,
                "corpus": healing.CORPUS,
                "control": control | ({"tokens": masks} if method == "hard_concrete" else {}),
                "mixture": {"method": "reference_loss", "windows": 4},
                "partition": {"method": "random", "experts": 8, "top_k": 4, "seed": seed},
                "pretrain": {
                    **healing.TRAINING,
                    "tokens": total,
                    "eval_tokens": total,
                    "eval_windows": 4,
                    "seed": seed,
                },
                "evaluate": {"seq_len": 512, "windows": 8, "batch": 4},
            }
    return made


def run(folder: Path, keys: Sequence[str]) -> None:
    """The stages that a child needs, of what is not there yet or was made with other settings. The mixture is measured
    once."""
    if not (folder / "data/models" / healing.MODEL / "config.json").exists():
        healing.stage("moe.dense", healing.MODEL, folder=folder)
        healing.stage("corpus.fingerprint", healing.CORPUS, folder=folder)
        healing.stage("corpus", healing.CORPUS, folder=folder)
    for key in keys:
        mixture = folder / "runs" / key / "mixture.json"
        first = next(iter(sorted((folder / "runs").glob("*/mixture.json"))), None)
        if first is None:
            healing.stage("mixture", key, folder=folder)
        elif not mixture.exists():
            mixture.parent.mkdir(parents=True)
            mixture.write_bytes(first.read_bytes())
        healing.stage("control", key, folder=folder)  # which keeps a child of the same inputs


def table(folder: Path, rows: Sequence[str], seeds: Sequence[int]) -> None:
    """Mean over the seeds, nats per token of the validation windows."""
    print("| units chosen by | parameters | parent | after the cut | healed | masks' tokens | healing's | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        known = [json.loads((folder / "runs" / key_of(row, seed) / "control.json").read_text()) for seed in seeds]
        first = known[0]
        parent = statistics.mean(first["references"].values())
        cut, healed = (
            statistics.mean(each["loss"][moment]["mean"] for each in known) for moment in ("cut", "trained")
        )
        seconds = statistics.mean(sum(each["seconds"].values()) for each in known)
        masks = first["masks"]["tokens"] if "masks" in first else 0
        print(
            f"| {row} | {first['parameters'] / 1e6:.1f} M | {parent:.3f} | {cut:.3f} | {healed:.3f} | {masks:,} "
            f"| {first['tokens']:,} | {seconds:.0f} |"
        )
    for row, seed in ((row, seed) for row in rows for seed in seeds if row == "hard_concrete"):
        made = json.loads((folder / "runs" / key_of(row, seed) / "control.json").read_text())["masks"]
        sizes = ", ".join(
            f"{field} {size['expected']:g} (asked: {size['target']})" for field, size in made["size"].items()
        )
        print(f"masks of seed {seed}: {sizes}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", nargs="+", metavar="FIELD=SIZE", help=f"{SHAPE} if absent")
    parser.add_argument("--masks", type=int, default=40960, help="tokens on which masks are trained")
    parser.add_argument("--tokens", type=int, default=24576, help="tokens of healing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, metavar="NAME")
    arguments = parser.parse_args(argv)
    pairs = [pair.partition("=") for pair in arguments.shape or ()]
    shape = {field: int(size) for field, _, size in pairs} or SHAPE
    folder = arguments.folder.resolve()
    made = pipelines(arguments.only, arguments.seeds, shape=shape, masks=arguments.masks, tokens=arguments.tokens)
    healing.prepare(folder, made)
    run(folder, list(made))
    table(folder, arguments.only, arguments.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
