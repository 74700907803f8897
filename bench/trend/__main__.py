"""Trend over size: how far the split lies below its dense child, of dense models trained here from scratch.

    python -m bench.trend FOLDER [--corpus data/corpora/wide] [--model data/models/smollm2-135m-q4]
                                 [--sizes 100k 300k 1m 3m 10m] [--shares 50 25] [--tokens 1228800]

Makes a project in FOLDER. The text of the corpus is tokenised anew with a vocabulary of 2,048 made from its training
documents, LLaMAs of each size are trained on it, and each is cut to each share of its FFN: into this project's split
(token_clusters: one shared expert, one of eight routed ones, refit) and into its dense child, with the same refit on
the same calibration windows and the same healing. Prints losses on test windows and their differences, paired by
window. Killed, it goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import common, healing
from bench.trend import sizes, text
from tasks import scratch

WINDOWS = 16  # of each domain, or all that its test split has
MOMENTS = {"right after the cut": ("moe", "control/split"), "healed": ("trained", "control/model")}
"""Folders of the split and of the child in runs/KEY."""


def prepare(folder: Path, made: dict[str, sizes.Size], *, corpus: Path, model: Path) -> None:
    """The project: code by links, text, vocabulary, settings, models at their start, and the corpus."""
    from ruamel.yaml import YAML

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tasks", "kernels", "flows"):
        if not (folder / name).exists():
            (folder / name).symlink_to(common.ROOT / name)
    if not (folder / "text").exists():
        unfinished = folder / "text.unfinished"
        text.write(corpus, unfinished, tokenizer=model, vocabulary=sizes.VOCABULARY)
        unfinished.rename(folder / "text")
    with (folder / "pipelines.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(sizes.settings(folder, made, heldout=text.heldout(corpus)), file)
    for name, size in made.items():
        start = folder / "data/models" / sizes.start_of(name)
        if not (start / "config.json").exists():
            sizes.start(size, start, tokenizer=folder / "text/tokenizer")
    if not (folder / "data/corpora" / sizes.CORPUS / "manifest.json").exists():
        healing.stage("corpus.fingerprint", sizes.CORPUS, folder=folder)
        healing.stage("corpus", sizes.CORPUS, folder=folder)


def train(folder: Path, name: str, size: sizes.Size) -> None:
    """Train a size from scratch, and make it a model of the project.

    Raises SystemExit if it is there and was trained on another number of tokens.
    """
    key = sizes.dense_of(name)
    root, target = folder / "runs" / key, folder / "data/models" / key
    if target.exists():
        made = root / "pretrain.json"
        if (tokens := json.loads(made.read_text())["tokens"]) != size.trained:
            raise SystemExit(
                f"{made}: tokens = {tokens}, asked for are {size.trained}; name another FOLDER, or --tokens"
            )
        return
    if not (root / "mixture.json").exists():
        healing.stage("mixture", key, folder=folder)
    if not (root / "moe").exists():
        shutil.copytree(folder / "data/models" / sizes.start_of(name), root / "moe", copy_function=os.link)
    if not (root / "pretrain.json").exists():
        healing.stage("pretrain", key, folder=folder)
    shutil.copytree(root / "trained", target, copy_function=os.link)


def cut(folder: Path, key: str) -> None:
    """Split a trained size, cut its child, and heal both, as far as it is not there yet."""
    root = folder / "runs" / key
    mixture = folder / "runs" / "healing.json"  # the same for all
    if not mixture.exists():
        healing.stage("mixture", key, folder=folder)
        shutil.copyfile(root / "mixture.json", mixture)
    root.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(mixture, root / "mixture.json")
    for stage, result in {
        "partition": "partition.json",
        "pretrain": "pretrain.json",
        "control": "control.json",
    }.items():
        if not (root / result).exists():
            healing.stage(stage, key, folder=folder)


def measure(folder: Path, key: str, parent: Path) -> dict[str, Any]:
    """Summed nats of each test window, {model: {domain: [...]}}, of the parent and of MOMENTS; kept in trend.json."""
    from tasks.corpus.sampling import windows

    kept, root = folder / "runs" / key / "trend.json", folder / "runs" / key
    if not kept.exists():
        text_of = windows.test(folder / "data/corpora" / sizes.CORPUS, seq_len=sizes.SEQ_LEN, count=WINDOWS)
        models = {"parent": parent, **{name: root / name for pair in MOMENTS.values() for name in pair}}
        scratch.write_json(kept, {name: _nats(path, text_of) for name, path in models.items()})
    known: dict[str, Any] = json.loads(kept.read_text())
    return known


def _nats(model: Path, text_of: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    from tasks.moe.streamed import Streamed

    nats_B = Streamed(model).nll(np.concatenate(list(text_of.values())), batch=16)
    ends = np.cumsum([len(ids) for ids in text_of.values()])[:-1]
    return {name: part.tolist() for name, part in zip(text_of, np.split(nats_B, ends), strict=True)}


def row(nats: Mapping[str, Mapping[str, list[float]]], split: str, child: str) -> dict[str, float]:
    """Mean losses in nats per token, how far the split is below the child with its stderr, and the part of the child's
    distance from the parent that this is."""
    from tasks.evaluate import likelihood

    counts = {
        name: {"windows": len(each), "tokens": len(each) * (sizes.SEQ_LEN - 1)} for name, each in nats[child].items()
    }
    loss = {
        name: float(np.mean([sum(each) / counts[domain]["tokens"] for domain, each in nats[name].items()]))
        for name in ("parent", split, child)
    }
    below = likelihood.difference(nats[child], nats[split], counts)
    return {
        "parent": loss["parent"],
        "split": loss[split],
        "child": loss[child],
        "below": below["loss"],
        "stderr": below["stderr"],
        "part": below["loss"] / (loss[child] - loss["parent"]),
    }


def slope(bodies: Sequence[int], rows: Sequence[Mapping[str, float]], field: str) -> tuple[float, float]:
    """Change of `below`, or of `part`, with ten times the size: least squares weighted by stderr, and its stderr."""
    scale = [each[field] / each["below"] for each in rows]
    weights = [1 / abs(each["stderr"] * factor) for each, factor in zip(rows, scale, strict=True)]
    fit, covariance = np.polyfit(np.log10(bodies), [each[field] for each in rows], 1, w=weights, cov="unscaled")
    return float(fit[0]), float(np.sqrt(covariance[0, 0]))


def table(made: Mapping[str, sizes.Size], measured: Mapping[str, dict[int, Any]], shares: Sequence[int]) -> list[str]:
    """The lines of the table, and under it the slopes of each share."""
    lines, slopes = [], []
    for moment, pair in MOMENTS.items():
        lines += [
            f"Test windows, {moment}, nats/token:",
            "",
            "| body, M | tokens, M | FFN active | parent | split | child | split below child | of the child's loss |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for share in shares:
            rows = [row(nats[share], *pair) for nats in measured.values()]
            for size, each in zip((made[name] for name in measured), rows, strict=True):
                losses = " | ".join(f"{each[name]:.3f}" for name in ("parent", "split", "child"))
                lines.append(
                    f"| {size.body / 1e6:.2f} | {size.tokens / 1e6:g} | {share} % | {losses} "
                    f"| {each['below']:.3f} ± {each['stderr']:.3f} | {each['part']:.0%} |"
                )
            if len(rows) > 2:
                bodies = [made[name].body for name in measured]
                (nats_slope, error), (part, part_error) = (slope(bodies, rows, field) for field in ("below", "part"))
                slopes.append(
                    f"{share} %, {moment}: {nats_slope:+.3f} ± {error:.3f} nats and {100 * part:+.1f} ± "
                    f"{100 * part_error:.1f} points of the child's loss with ten times the size"
                )
        lines.append("")
    return lines + slopes


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", type=Path, default=Path("data/corpora/wide"), help="tokenised text")
    parser.add_argument(
        "--model", type=Path, default=Path("data/models/smollm2-135m-q4"), help="its tokenizer's model"
    )
    parser.add_argument("--sizes", nargs="+", choices=list(sizes.SIZES), default=list(sizes.SIZES))
    parser.add_argument(
        "--shares", type=int, nargs="+", choices=sizes.SHARES, default=[50, 25], help="per cent of the FFN"
    )
    parser.add_argument("--tokens", type=int, help="of every size (default: 20 for each parameter, at most 20 M)")
    arguments = parser.parse_args(argv)
    known = {name: replace(size, tokens=arguments.tokens or size.tokens) for name, size in sizes.SIZES.items()}
    folder, made = arguments.folder.resolve(), {name: known[name] for name in arguments.sizes}
    prepare(folder, known, corpus=arguments.corpus, model=arguments.model)
    measured: dict[str, dict[int, Any]] = {}
    for name in made:
        train(folder, name, made[name])
        measured[name] = {}
        for share in arguments.shares:
            key = sizes.cut_of(name, share)
            cut(folder, key)
            measured[name][share] = measure(folder, key, folder / "data/models" / sizes.dense_of(name))
        print(*table(made, measured, arguments.shares), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
