"""What a pipeline will cost, from its settings alone: parameters, FLOPs, memory, disk, time. Nothing is downloaded.

Parameters and FLOPs are exact counts. Memory, disk and time are estimates; each says from what.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import sources
from tasks.moe import counts, families
from tasks.settings import Partition, Pipeline, Pretrain, Settings, SettingsError

UTILISATION = 0.4
"""Share of the matrix-product speed that training reaches: 0.4 is usual on A100s."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Figures of one pipeline; sizes in bytes."""

    pipeline: str
    dense: dict[str, int]
    sparse: dict[str, int]
    model_type: str
    """Class of the sparse model."""
    expert_width: int
    sparse_layers: int
    layers: int
    steps: int
    tokens: int
    train_flops: int
    other_flops: int
    dtype: str
    memory: dict[str, float]
    disk: dict[str, float]

    def seconds(self, flops_per_second: float) -> float:
        """Time for all FLOPs at UTILISATION of a matrix-product speed over all processes."""
        return (self.train_flops + self.other_flops) / (UTILISATION * flops_per_second)


def plan(settings: Settings, name: str, *, bfloat16: bool) -> Plan:
    """Compute the figures of one pipeline.

    Args:
        settings: pipelines.yaml or a recipe, validated.
        name: the pipeline.
        bfloat16: what `precision: auto` means on the machine that will train.

    Raises:
        SettingsError: no such pipeline, or the model has neither a `shape` nor been fetched.
    """
    pipeline = settings.pipeline(name)
    dense = dense_config(settings, pipeline.model)
    sparse = sparse_config(dense, pipeline.partition)
    train = pipeline.pretrain
    tokens = train.steps * train.batch * train.seq_len
    is_bfloat16 = train.precision == "bfloat16" or (train.precision == "auto" and bfloat16)
    experts = counts.experts(sparse)
    sizes = {"dense": counts.parameters(dense), "sparse": counts.parameters(sparse)}
    return Plan(
        pipeline=name,
        dense=sizes["dense"],
        sparse=sizes["sparse"],
        model_type=sparse["model_type"],
        expert_width=experts["expert_size"],
        sparse_layers=len(experts["layers"]),
        layers=sparse["num_hidden_layers"],
        steps=train.steps,
        tokens=tokens,
        train_flops=tokens * counts.flops_per_token(sparse, seq_len=train.seq_len)["train"],
        other_flops=_other_flops(settings, pipeline, dense=dense, sparse=sparse),
        dtype="bfloat16" if is_bfloat16 else "float32",
        memory=memory(sparse, train, bfloat16=is_bfloat16),
        disk=_disk(settings, pipeline, sizes=sizes, width=2 if is_bfloat16 else 4),
    )


def dense_config(settings: Settings, model: str) -> dict[str, Any]:
    """The dense model's config.json: fetched, or in the folder it comes from, or made from its `shape`.

    Raises SettingsError where there is none of these.
    """
    fetched = Path("data/models", model, "config.json")
    source = sources.parse(settings.model(model).source)
    for path in [fetched, *[Path(source.path, "config.json")][: source.kind == "dir"]]:
        if path.exists():
            config: dict[str, Any] = json.loads(path.read_text())
            return config
    shape = settings.model(model).shape
    if shape is None:
        raise SettingsError(
            f"pipelines.yaml: models.{model}.shape is missing and {fetched} is not there yet; "
            "give its sizes under `shape`, or run `dvc repro model@" + model + "` first"
        )
    return shape.model_dump(exclude_none=True)


def sparse_config(dense: dict[str, Any], partition: Partition) -> dict[str, Any]:
    """The config.json of the MoE that the partition stage will build.

    Raises SettingsError, naming every target class and why it does not fit, if there is none.
    """
    from transformers import AutoConfig

    from tasks.partition import exporters

    try:
        families.check(dense)
        parent = AutoConfig.for_model(**dense)
        sparse: dict[str, Any] = exporters.choose(parent, partition).config(parent, partition).to_dict()
    except ValueError as error:
        raise SettingsError(f"partition: {error}") from None
    return sparse


def memory(config: dict[str, Any], train: Pretrain, *, bfloat16: bool) -> dict[str, float]:
    """Bytes per process while training with DeepSpeed: weights, gradients, optimizer, activations, total.

    AdamW keeps two float32 moments, and a float32 copy of bfloat16 weights; ZeRO 1, 2 and 3 divide the optimizer, the
    gradients and the weights over the processes. Activations are an estimate: what autograd keeps of every layer for
    one micro-batch, with an attention that keeps no scores, and the logits.
    """
    total = counts.parameters(config)["total"]
    width, shards = (2 if bfloat16 else 4), train.processes
    sums = 4 if bfloat16 and train.zero_stage and train.batch > train.micro_batch * shards else 0
    parts = {
        "weights": total * width / (shards if train.zero_stage >= 3 else 1),
        "gradients": total * width / (shards if train.zero_stage >= 2 else 1) + total * sums / shards,
        "optimizer": total * (12 if bfloat16 else 8) / (shards if train.zero_stage >= 1 else 1),
        "activations": float(_activations(config, train, width=width)),
    }
    return parts | {"total": sum(parts.values())}


def _activations(config: dict[str, Any], train: Pretrain, *, width: int) -> int:
    found = counts.experts(config)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    attention = 2 * heads * head_dim + 2 * (config.get("num_key_value_heads") or heads) * head_dim
    # gate, up and the product of every active neuron; moe_kernels keeps no gathered copy of the tokens.
    sparse = 4 * hidden + attention + 3 * (found["top_k"] * found["expert_size"] + found["shared_size"])
    dense = 4 * hidden + attention + 3 * config["intermediate_size"]
    layers, moe = config["num_hidden_layers"], len(found["layers"])
    if train.gradient_checkpointing:
        kept = layers * hidden + (sparse if moe == layers else max(sparse, dense))
    else:
        kept = moe * sparse + (layers - moe) * dense
    logits = config["vocab_size"] * (width + 4 + 4)  # logits, in float32, and their gradient
    return train.micro_batch * train.seq_len * (kept * width + logits)


def _other_flops(settings: Settings, pipeline: Pipeline, *, dense: dict[str, Any], sparse: dict[str, Any]) -> int:
    """Forward passes outside training: references, calibration, held-out evaluation during and after training."""
    from tasks.partition.construct import needs_text

    domains, train, judge = len(settings.corpus(pipeline.corpus).domains), pipeline.pretrain, pipeline.evaluate

    def forward(config: dict[str, Any], *, windows: int, seq_len: int) -> int:
        return windows * seq_len * counts.flops_per_token(config, seq_len=seq_len)["forward"]

    calibration = pipeline.partition.calibration_windows if needs_text(pipeline.partition) else 0
    references = pipeline.mixture.windows * domains if pipeline.mixture.method == "reference_loss" else 0
    evaluations = (train.steps // train.eval_every + 1) * train.eval_windows * domains
    return (
        forward(dense, windows=references, seq_len=judge.seq_len)
        + forward(dense, windows=calibration, seq_len=train.seq_len)
        + forward(sparse, windows=evaluations, seq_len=train.seq_len)
        + forward(dense, windows=judge.windows * domains, seq_len=judge.seq_len)
        + 2 * forward(sparse, windows=judge.windows * domains, seq_len=judge.seq_len)
    )


def _disk(settings: Settings, pipeline: Pipeline, *, sizes: dict[str, dict[str, int]], width: int) -> dict[str, float]:
    dtype = 2 if settings.model(pipeline.model).dtype == "bfloat16" else 4
    total = sizes["sparse"]["total"]
    parts: dict[str, float] = {
        "dense checkpoint": sizes["dense"]["total"] * dtype,
        "MoE after the split": total * dtype,
        "trained MoE": total * dtype,
        "training checkpoints in .scratch (2 are kept)": 2 * total * (14 if width == 2 else 12),
    }
    if (manifest := Path("data/corpora", pipeline.corpus, "manifest.json")).exists():
        parts["shards"] = sum(path.stat().st_size for path in manifest.parent.rglob("*.arrow"))
    return parts | {"total": sum(parts.values())}


def calibrate(*, bfloat16: bool, seconds: float = 0.5) -> tuple[float, str]:
    """Measure this machine's matrix products: (FLOP/s, what was measured), on one GPU or on all CPU threads."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)

    def product() -> None:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    product()
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        product()
        done += 1
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return done * 2 * size**3 / spent, where
