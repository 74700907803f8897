"""What a finished run leaves: the checkpoint to judge, the log, the metrics. Only the metrics know the clock."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import scratch
from tasks.pretrain import engine as engines
from tasks.pretrain import log
from tasks.pretrain.job import JOB, Job

if TYPE_CHECKING:
    import torch

    from tasks.pretrain.loop import Trainer

FIT_TOKENS = 8192
"""Training tokens on which linear routers are fitted to two-layer gates."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")


def source_dtype(model: Path) -> str:
    """The dtype that a checkpoint's config.json states, such as `float32`."""
    config = json.loads((model / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def write(trainer: Trainer, *, config: dict[str, Any]) -> None:
    """Write workspace/{trained,training/…,pretrain.json,loss.csv,heldout.csv}; all ranks must call it."""
    job = trainer.job
    weights = engines.full_weights(trainer.engine)
    if weights is None:
        return
    fit = _checkpoint(trainer, weights)
    training = job.workspace / "training"
    scratch.write_json(training / "deepspeed.json", config)
    scratch.write_json(training / "expert_load.json", {"before": trainer.load_before, "after": trainer.load_after})
    shutil.copyfile(job.workspace / JOB, training / JOB)
    records = log.read(training / "log.jsonl", "heldout")
    (job.workspace / "loss.csv").write_text(log.loss_csv(log.read(training / "log.jsonl", "step")))
    (job.workspace / "heldout.csv").write_text(log.heldout_csv(records))
    scratch.write_json(job.workspace / "pretrain.json", _metrics(trainer, records) | fit)


def publish(job: Job) -> None:
    """Move the results to runs/<pipeline>/, and drop the workspace's checkpoints once all are there.

    The log is published as a copy: a run killed in here goes on from its last checkpoint, which needs the log.
    """
    target = Path("runs") / job.pipeline
    target.mkdir(parents=True, exist_ok=True)
    copy = job.workspace / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(job.workspace / "training", copy)
    scratch.publish(copy, target / "training")
    for name in ("trained", "loss.csv", "heldout.csv", "pretrain.json"):
        scratch.publish(job.workspace / name, target / name)
    shutil.rmtree(job.workspace / "training")
    shutil.rmtree(job.workspace / "checkpoints")


def _checkpoint(trainer: Trainer, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A Hugging Face checkpoint of the trained weights in the split model's dtype, with the files beside it.

    Two-layer gates go into gates.safetensors, and linear routers fitted to them on training windows into the
    checkpoint. Returns how near these come, as `gate_fit`; without such gates, nothing.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from tasks.moe import gate, linear

    disable_progress_bar()
    job, model = trainer.job, trainer.engine.module
    dtype = getattr(torch, source_dtype(job.model))
    folder = job.workspace / "trained"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in job.model.iterdir():  # tokenizer, generation_config, chat template: byte for byte
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    gates = gate.take_out(weights)
    model.save_pretrained(folder, state_dict=weights)
    model.config.dtype = dtype  # transformers wrote the training dtype, in which a plain load would then round
    model.config.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600
    if not gates:
        return {}
    gate.write(folder, gates)
    batches = [trainer.loader.next().input_ids]  # what training would have read next
    batches += [trainer.loader.next().input_ids for _ in range(FIT_TOKENS // batches[0].size)]
    return {"gate_fit": linear.refit(folder, gates, np.concatenate(batches))}


def _metrics(trainer: Trainer, heldout: list[dict[str, Any]]) -> dict[str, Any]:
    from tasks.corpus import manifest
    from tasks.moe import counts

    job, params = trainer.job, trainer.params
    config = json.loads((job.model / "config.json").read_text())
    tokens = params.steps * trainer.tokens_per_step
    speed = tokens / trainer.seconds["steps"]
    flops = counts.flops_per_token(config, seq_len=params.seq_len)["train"] * speed
    peak = _gemm_flops_per_second(trainer) * trainer.place.world_size
    corpus = manifest.load(job.corpus)
    seen = {domain: windows * params.seq_len for domain, windows in trainer.windows_seen.items()}
    return {
        "steps": params.steps,
        "tokens": tokens,
        "predicted_tokens": trainer.predicted,
        "domain_tokens": seen,
        "domain_epochs": {domain: seen[domain] / corpus.domains[domain].train.tokens for domain in seen},
        "tokens_per_second": speed,
        "flops_per_second": flops,
        "mfu": flops / peak,
        "active_parameters": counts.parameters(config)["active"],
        "seconds": trainer.seconds["total"],
        "precision": str(next(trainer.engine.module.parameters()).dtype).removeprefix("torch."),
        "processes": trainer.place.world_size,
        "heldout_before": heldout[0]["losses"],
        "heldout_after": heldout[-1]["losses"],
        "heldout_mean_before": heldout[0]["mean"],
        "heldout_mean_after": heldout[-1]["mean"],
        "weights": trainer.weights,
        "resumed_from": trainer.resumed_from,
    }


def _gemm_flops_per_second(trainer: Trainer, size: int = 1024, rounds: int = 5) -> float:
    """FLOP/s of a square matrix product in the training dtype here: the peak that MFU is a share of."""
    import torch

    dtype = next(trainer.engine.module.parameters()).dtype
    size = size * 8 if trainer.place.device.type == "cuda" else size
    a = torch.ones(size, size, dtype=dtype, device=trainer.place.device)
    best = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        (a @ a)[0, 0].item()  # the read waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best
