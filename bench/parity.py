"""Compare two commits by what they make: a shortened demo's shards, experts, weights, losses and figures.

    python -m bench.parity OLD NEW [--keep FOLDER]

Each commit is cloned, its demo is shortened to twelve steps, and `dvc repro evaluate@demo` runs in the clone. Files
are compared by SHA-256, losses by their text, figures by value. Exits with 1 if anything differs. Takes five minutes a
commit on two cores; a second run with the same `--keep` makes only what is missing.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

SHORT: dict[str, dict[str, Any]] = {
    "partition": {"calibration_windows": 8},
    "pretrain": {"tokens": 6144, "warmup_tokens": 1024, "eval_tokens": 3072, "save_every": 6},
    "evaluate": {"windows": 2},
}
"""Settings of the demo that make it twelve steps of 512 tokens."""
CLOCK = ("second", "tokens_per", "mfu", "time", "speed", "memory", "eta", "_s", "gb")
"""Parts of the names of columns and figures that depend on the machine."""
MODELS = {"moe": "converted", "split": "converted", "dense": "parent", "child": "baseline", "control": "baseline"}
"""{name of a model in evaluation.json up to d7c4827: its name since}."""


def make(commit: str, folder: Path) -> None:
    """Clone a commit into `folder` and run its shortened demo."""
    if not folder.exists():
        subprocess.run(["git", "clone", "-q", "--no-checkout", ".", folder], check=True)
        subprocess.run(["git", "-C", folder, "checkout", "-q", commit], check=True)
    yaml, path = YAML(), folder / "pipelines.yaml"
    settings = yaml.load(path.read_text())
    demo = settings["pipelines"]["demo"]
    for section, values in SHORT.items():
        demo[section].update(values)
    demo["evaluate"]["tasks"][0]["limit"] = 40
    with path.open("w") as file:
        yaml.dump(settings, file)
    paths = os.pathsep.join([str(folder), str(folder / "kernels")])
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "evaluate@demo"],
        cwd=folder,
        check=True,
        stdout=sys.stderr,
        env=os.environ | {"PYTHONPATH": paths, "PATH": commands},
    )


def products(folder: Path) -> dict[str, str]:
    """{what was made: its digest or value} of a finished demo."""
    found = {}
    for pattern in ("data/corpora/demo/**/*.arrow", "runs/demo/**/*.safetensors", "data/models/**/*.safetensors"):
        for path in sorted(folder.glob(pattern)):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.glob("runs/demo/*/*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                label = f"{path.relative_to(folder)} step {row.get('step')} {row.get('domain', '')}"
                found |= {f"{label} {column}": value for column, value in row.items() if not _timed(column)}
    return found | figures(json.loads((folder / "runs/demo/evaluation.json").read_text()))


def figures(evaluation: dict[str, Any]) -> dict[str, str]:
    """{model, name and domain: value} of both forms of evaluation.json."""
    if "figures" in evaluation:
        return {
            f"figure {figure['model']} {figure['name']} {figure.get('domain') or ''}".strip(): repr(figure["value"])
            for figure in evaluation["figures"]
            if not _timed(figure["name"])
        }
    return {f"figure {name}": repr(value) for name, value in _flat(evaluation) if not _timed(name)}


def _flat(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [
            leaf for key, value in node.items() for leaf in _flat(value, f"{prefix} {MODELS.get(key, key)}".strip())
        ]
    return [(prefix, node)] if isinstance(node, int | float) else []


def _timed(name: str) -> bool:
    return any(part in name.lower() for part in CLOCK)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="+", help="one commit prints what it makes; two are compared")
    parser.add_argument("--keep", type=Path, help="folder for the clones; without it they are deleted")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.keep or Path(scratch)).resolve()
        made = []
        for commit in arguments.commits:
            make(commit, folder / commit)
            made.append(products(folder / commit))
    if len(made) == 1:
        print(json.dumps(made[0], indent=1))
        return 0
    old, new = made
    differ = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    for name in differ:
        print(f"differs: {name}: {old[name]} -> {new[name]}")
    for name in sorted(old.keys() ^ new.keys()):
        print(f"only in {'the old' if name in old else 'the new'}: {name}")
    print(f"{len(old.keys() & new.keys())} compared, {len(differ)} differ")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
