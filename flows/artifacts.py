"""`moeforge inspect`, `verify` and `repair`: dispatches a path to the code that knows its format.

| path | inspect | verify |
|---|---|---|
| shard (*.arrow) | counts, provenance, first tokens as text | against its corpus's manifest |
| corpus (folder with manifest.json) | counts and rules per domain, licences, first tokens | every byte |
| mixture.json | weights beside the uniform and the proportional ones | weights are positive and sum to 1 |
| partition.safetensors | method, seed, sizes, first indices | with its checkpoint |
| checkpoint (folder with config.json) | class, sizes, tensors, licence | finite; runs/*/moe: the identity test |
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks import architectures, settings
from tasks.moe import counts


class ArtifactError(ValueError):
    """Nothing is at a path, or nothing that can be inspected, verified or repaired; the message says what can be."""


def kind(path: Path) -> str:
    """The kind of a path: shard, corpus, mixture, partition or checkpoint. Raises ArtifactError for anything else."""
    if not path.exists():
        raise ArtifactError(f"{path}: nothing is there")
    if path.suffix == ".arrow":
        return "shard"
    if path.name == "partition.safetensors":
        return "partition"
    if path.name == "mixture.json":
        return "mixture"
    if path.is_dir() and (path / "manifest.json").exists():
        return "corpus"
    if path.is_dir() and (path / "config.json").exists():
        return "checkpoint"
    raise ArtifactError(
        f"{path}: not known; give a shard (*.arrow), a corpus (folder with manifest.json), mixture.json, "
        "partition.safetensors or a checkpoint (folder with config.json)"
    )


def inspect(path: Path) -> dict[str, Any]:
    """Describe a file or folder as JSON-able values. Raises ArtifactError: unknown, or damaged."""
    from tasks.tools import inspect_corpus as corpus

    describe: dict[str, Callable[[Path], dict[str, Any]]] = {
        "shard": corpus.describe_shard,
        "corpus": corpus.describe_manifest,
        "mixture": _mixture,
        "partition": _partition,
        "checkpoint": _checkpoint,
    }
    what = kind(path)
    try:
        return describe[what](path)
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: no sound {what}: {error}") from None


def inspect_step(run: Path, number: int, *, full: bool) -> dict[str, Any]:
    """The documents that a step of a run saw, as JSON-able values. Raises ArtifactError: there is no such step."""
    from tasks.pretrain.job import TrainingError
    from tasks.tools import inspect_run

    try:
        return inspect_run.step(run, number, full=full)
    except (TrainingError, ValueError) as error:
        raise ArtifactError(str(error)) from None


def verify(path: Path) -> list[str]:
    """What is wrong with a file or folder; empty if it is sound. Raises ArtifactError if it cannot be verified."""
    from tasks.tools import verify_corpus as corpus

    match kind(path):
        case "shard":
            return corpus.verify_shard(path)
        case "corpus":
            return corpus.verify_corpus(path)
        case "mixture":
            return list(_mixture_problems(path))
        case "partition":
            return _identity(path.parent / "moe")
        case _ if (path.parent / "partition.safetensors").exists() and path.name == "moe":
            return [*_tensor_problems(path), *_identity(path)]
        case _:
            return list(_tensor_problems(path))


def repair(path: Path) -> list[str]:
    """Repair a corpus, printing what was done; returns what is still wrong. Raises ArtifactError for anything else."""
    from tasks.tools import repair_corpus

    if (what := kind(path)) != "corpus":
        raise ArtifactError(f"{path}: a {what} cannot be repaired, only a corpus; run the stage that made it again")
    return repair_corpus.repair(path)


def _mixture(path: Path) -> dict[str, Any]:
    mixture = json.loads(path.read_text())
    evidence = mixture["evidence"]
    columns = {"weight at start": mixture["weights"]} | {
        key: evidence[key] for key in ("uniform", "proportional", "tokens")
    }
    if "reference_losses" in evidence:
        columns["reference_loss"] = evidence["reference_losses"]
    domains = {name: {key: column.get(name) for key, column in columns.items()} for name in mixture["weights"]}
    return {"path": str(path), "method": mixture["method"], "domains": domains}


def _mixture_problems(path: Path) -> Iterator[str]:
    weights = json.loads(path.read_text())["weights"]
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()):
        yield f"{path}: weights must be finite and not negative: {weights}"
    elif not math.isclose(total := sum(weights.values()), 1, abs_tol=1e-9):
        yield f"{path}: weights sum to {total}, not to 1"


def _partition(path: Path) -> dict[str, Any]:
    from tasks.partition import index

    partition = index.read(path)
    first = min(partition.layers)
    return {
        "path": str(path),
        "layers": sorted(partition.layers),
        "scales": [partition.scales[layer] for layer in sorted(partition.layers)],
        "experts": partition.experts,
        "shared_experts": partition.shared_experts,
        "expert_size": partition.expert_size,
        **partition.meta,
        "first_indices": partition.layers[first][0][:16].tolist(),
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    config = json.loads((path / "config.json").read_text())
    headers = list(_headers(path))
    stored: Counter[str] = Counter()
    for _, dtype, shape in headers:
        stored[dtype] += math.prod(shape)
    provenance = path.with_name(f"{path.name}.json")  # the model stage's record stands beside its folder
    known = json.loads(provenance.read_text()) if provenance.exists() else {}
    return {
        "path": str(path),
        "architectures": config.get("architectures"),
        "parameters": counts.parameters(config),
        **({"experts": counts.experts(config)} if architectures.is_moe(config) else {}),
        "stored_values": dict(stored),
        "tensors": len(headers),
        "bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
        "config": {key: value for key, value in config.items() if isinstance(value, int | float | str)},
        "files": sorted(file.name for file in path.iterdir()),
        **{key: known[key] for key in ("source", "source_sha256", "license") if key in known},
    }


def _headers(path: Path) -> Iterator[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of every tensor of a checkpoint, from the files' headers alone."""
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                yield name, part.get_dtype(), part.get_shape()


def _tensor_problems(path: Path) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors"))
    if not files:
        yield f"{path}: no safetensors file"
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if not opened.get_tensor(name).isfinite().all():
                        yield f"{file}: {name} holds a value that is not finite"
        except SafetensorError as error:
            yield f"{file}: cut short or damaged ({error}); run the stage that writes it again"


def _identity(moe: Path) -> list[str]:
    """The identity test of runs/PIPELINE/moe against its index and the dense parent that pipelines.yaml names."""
    from tasks.tools.verify_partition import verify_checkpoint

    pipeline = moe.resolve().parent.name
    dense = Path("data/models") / settings.load().pipeline(pipeline).model
    if not dense.exists():
        raise ArtifactError(f"{dense}: the dense parent is not here; `dvc pull {dense}` or run the pipeline")
    return verify_checkpoint(moe, moe.parent / "partition.safetensors", dense)
