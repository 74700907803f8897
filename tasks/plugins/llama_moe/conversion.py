"""Import of the checkpoints that LLaMA-MoE released, tensor by tensor and without their code.

    report = conversion.convert(source, target)

The result is a stock checkpoint. A two-layer gate is kept in gates.safetensors, exact; the checkpoint's own routers
are linear ones fitted to it (tasks/moe/linear.py), and the report says how near they come.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from tasks import layout, scratch
from tasks.corpus import manifest
from tasks.moe import families, files, gate, linear, untrusted
from tasks.moe.writer import DTYPES, ShardWriter
from tasks.partition import calibration, exporters
from tasks.plugins.llama_moe import formats

REPORT = "import.json"
_PICKLES = """holds its weights only as pickles ({names}), which can run any code when they are opened. \
The released repositories hold safetensors under the revision refs/pr/2; or convert the files where you trust them:
    import glob, torch, safetensors.torch
    for name in glob.glob("*.bin"):
        safetensors.torch.save_file(torch.load(name, weights_only=True), name.removesuffix("bin") + "safetensors")"""
SEQ_LEN = 2048
"""Tokens of a window to fit on, where the model takes as many."""


@dataclass(frozen=True, kw_only=True)
class Released:
    """A checkpoint folder whose config and headers have been read, and are known and whole."""

    folder: Path
    format: formats.Format
    files: dict[str, Path]
    """By tensor."""
    dtypes: dict[str, torch.dtype]

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored. Raises ValueError for one that holds NaN or infinity."""
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        untrusted.require_finite(tensor, name=name, file=str(self.files[name]))
        return tensor

    def blank(self, name: str) -> Tensor:
        """Its shape and dtype, without content."""
        return torch.empty(self.format.tensors[name], dtype=self.dtypes[name], device="meta")


def read(folder: Path) -> Released:
    """Read what a released checkpoint is, and hold its files against its config.

    Raises:
        FileNotFoundError: config.json or a weight file is missing.
        ValueError: neither v1 nor v2, pickles, a damaged file, missing or unknown tensors, or a config that asks for
            what is not computed here; with the file or field, the reason and the fix.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; give the folder of a whole checkpoint")
    try:
        raw = files.read_json(path)
        shards, listed = _weight_files(folder)
        headers = untrusted.headers(folder, shards, listed=listed)
        untrusted.check_config(raw, headers)
        shapes = {name: entry.shape for name, entry in headers.items()}
        kind = untrusted.understood(lambda: formats.of(raw, shapes), file="config.json")
        families.account(shapes, kind.tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return Released(
        folder=folder,
        format=kind,
        files={name: folder / entry.file for name, entry in headers.items()},
        dtypes={name: DTYPES[entry.dtype] for name, entry in headers.items()},
    )


def convert(source: Path, target: Path, *, ids_BL: np.ndarray | None = None) -> dict[str, Any]:
    """Write the stock checkpoint of a released one into a new folder, whole or not at all.

    One layer is in memory at a time, and the hidden states of the text.

    Args:
        source: folder of the released checkpoint.
        target: a folder that does not exist; its parent does, and for a while holds a hidden folder beside it.
        ids_BL: token windows on which linear routers are fitted to two-layer gates; without them, see
            linear.fit_gaussian.

    Returns:
        What import.json holds: the format, sizes, scales, and under `fit` how near the linear routers come (None
        where the released ones are linear, and exact).

    Raises:
        FileExistsError, FileNotFoundError, ValueError: see `read`; or no stock class can express the result.
    """
    if target.exists():
        raise FileExistsError(f"{target}: is there already; give a new folder, or move it away")
    released = read(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        staging.chmod(0o755)
        report = _write(released, staging, ids_BL)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return report


def windows(source: Path, corpus: Path, *, count: int) -> np.ndarray:
    """Training windows of a corpus for `convert`, int64 [count, L]. Raises ValueError for another tokenizer's."""
    manifest.require_tokenizer(manifest.load(corpus), source)
    longest = read(source).format.dense.max_position_embeddings
    ids_BL, _ = calibration.draw(corpus, seq_len=min(SEQ_LEN, longest), count=count, seed=0)
    return ids_BL


def _write(released: Released, folder: Path, ids_BL: np.ndarray | None) -> dict[str, Any]:
    kind = released.format
    exporter = exporters.choose(kind.dense, kind.partition)
    config = exporter.config(kind.dense, kind.partition)
    files.write_config(config, folder)
    files.copy_tokenizer(released.folder, folder)
    files.copy_documents(released.folder, folder)

    shapes = families.expected(kind.dense)
    carried = exporter.carried(kind.dense, kind.common)
    sparse_layers = kind.partition.sparse_layers(kind.dense.num_hidden_layers)
    dtype = released.dtypes[layout.EMBEDDINGS]
    added: dict[str, Tensor] = {}
    for i in range(kind.dense.num_hidden_layers):
        added |= exporter.extra(i, kind.dense, dtype=dtype)
    planned = dict(added)
    for i in sparse_layers:
        layer, _ = kind.sparse(i, released.blank)
        planned |= exporter.layer(i, layer, kind.dense)
    plan = {new: (released.dtypes[kind.common[name]], shapes[name]) for name, new in carried.items()}
    plan |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in planned.items()}
    gates: dict[int, gate.Gate] = {}
    with ShardWriter(folder, plan) as writer:
        for name, new in carried.items():
            writer.write(new, formats.filled(released.tensor(kind.common[name]), shapes[name]))
        for name, tensor in added.items():
            writer.write(name, tensor)
        for i in sparse_layers:
            layer, made = kind.sparse(i, released.tensor)
            for name, tensor in exporter.layer(i, layer, kind.dense).items():
                writer.write(name, tensor)
            if made is not None:
                gates[i] = made
    fit = None
    if gates:
        gate.write(folder, gates)
        fit = linear.refit(folder, gates, ids_BL)
    report = {
        "format": kind.name,
        "model_type": exporter.name,
        "experts": kind.partition.experts,
        "shared_experts": kind.partition.shared_experts,
        "top_k": kind.partition.top_k,
        "sparse_layers": sparse_layers,
        "scales": kind.scales,
        "parameters": sum(math.prod(shape) for _, shape in plan.values()),
        "fit": fit,
    }
    scratch.write_json(folder / REPORT, report)
    return report


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the files, and what the index says of them, where there is one."""
    if (listed := untrusted.indexed(folder)) is not None:
        names = sorted(set(listed.values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise FileNotFoundError(
                f"{folder}: {', '.join(missing)} named by {untrusted.INDEX} is missing; bring it as well"
            )
        return names, listed
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.name != gate.FILE and path.is_file())
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if not names and pickles:
        raise ValueError(_PICKLES.format(names=", ".join(pickles)))
    if not names:
        raise FileNotFoundError(f"{folder}: holds no *.safetensors")
    return names, None


def describe(report: dict[str, Any], *, source: Path, target: Path, corpus: Path | None) -> Iterator[str]:
    """What `convert` did, in a few lines."""
    yield (
        f"{source}: {report['format']}, {report['parameters']:,} parameters; {len(report['sparse_layers'])} layers"
        f" of {report['experts']} experts, {report['top_k']} for each token, and {report['shared_experts']} shared"
    )
    if fit := report["fit"]:
        text = f"{fit['tokens']:,} tokens of {corpus}" if corpus else "Gaussian inputs, for lack of a --corpus"
        worst = min(fit["layers"], key=lambda i: fit["layers"][i]["agreement"])
        yield (
            f"linear routers fitted on {text}: they make {fit['mean']['agreement']:.1%} of the gates' choices "
            f"(layer {worst}: {fit['layers'][worst]['agreement']:.1%}); the gates are in gates.safetensors"
        )
    yield f"{target}: a stock {report['model_type']} checkpoint"
