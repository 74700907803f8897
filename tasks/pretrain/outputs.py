"""The results of a finished run: the checkpoint, the log, the metrics. Only the metrics depend on the clock."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import scratch
from tasks.pretrain import export
from tasks.pretrain.checkpoints import finished
from tasks.pretrain.job import JOB, Job, code_version
from tasks.pretrain.log import cost_curve, log_file

if TYPE_CHECKING:
    from tasks.pretrain.loop import Trainer


def write(trainer: Trainer) -> None:
    """Write workspace/{trained,training/…,pretrain.json,loss.csv,validation.csv}; all ranks must call it."""
    from tasks.moe import gate

    job = trainer.job
    weights = trainer.engine.full_weights()
    if weights is None:
        return
    folder = job.workspace / "trained"
    shutil.rmtree(folder, ignore_errors=True)
    fit = export.write(
        folder,
        weights,
        model=job.model,
        biases=gate.biases(trainer.engine.module),
        hooks=trainer.hooks,
        windows=lambda: export.next_windows(trainer.loader),
    )
    training = job.workspace / "training"
    scratch.write_json(training / "deepspeed.json", trainer.engine.config)
    scratch.write_json(
        training / "expert_load.json", {"before": trainer.state.load_before, "after": trainer.state.load_after}
    )
    shutil.copyfile(job.workspace / JOB, training / JOB)
    records = log_file.read(training / "log.jsonl", "step", "validation")
    validation = [record for record in records if record["kind"] == "validation"]
    steps = [record for record in records if record["kind"] == "step"]
    (job.workspace / "loss.csv").write_text(log_file.loss_csv(steps))
    (job.workspace / "validation.csv").write_text(log_file.validation_csv(validation))
    config = json.loads((job.model / "config.json").read_text())
    curve = cost_curve.points(records, config=config, params=job.params)
    scratch.write_json(job.workspace / "pretrain.json", _metrics(trainer, validation, config) | {"curve": curve} | fit)


def publish(job: Job) -> None:
    """Move the results to runs/<pipeline>/, and once all are there the workspace to where a finished run's is kept.

    The log is published as a copy: a run killed in here goes on from its last checkpoint, which needs the log.
    """
    target = Path("runs") / job.pipeline
    target.mkdir(parents=True, exist_ok=True)
    copy = job.workspace / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(job.workspace / "training", copy)
    scratch.publish(copy, target / "training")
    for name in ("trained", "loss.csv", "validation.csv", "pretrain.json"):
        scratch.publish(job.workspace / name, target / name)
    finished.keep(job)


def _metrics(trainer: Trainer, validation: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    from tasks.corpus import manifest
    from tasks.moe import counts

    job, params = trainer.job, trainer.params
    tokens = params.steps * params.step_tokens
    speed = tokens / trainer.state.seconds["steps"]
    flops = counts.flops_per_token(config, seq_len=params.seq_len)["train"] * speed
    corpus = manifest.load(job.corpus)
    seen = {domain: windows * params.seq_len for domain, windows in trainer.state.windows_seen.items()}
    return {
        "steps": params.steps,
        "tokens": tokens,
        "predicted_tokens": trainer.state.predicted,
        "domain_tokens": seen,
        "domain_epochs": {domain: seen[domain] / corpus.trained[domain].train.tokens for domain in seen},
        "tokens_per_second": speed,
        "flops_per_second": flops,
        "mfu": flops / trainer.run_log.peak,
        "active_parameters": counts.parameters(config)["active"],
        "seconds": trainer.state.seconds["total"],
        "seconds_saving": trainer.state.seconds["saving"],
        "precision": str(trainer.engine.dtype).removeprefix("torch."),
        "processes": trainer.process.world_size,
        "code": code_version(),
        "validation_before": validation[0]["losses"],
        "validation_after": validation[-1]["losses"],
        "validation_mean_before": validation[0]["mean"],
        "validation_mean_after": validation[-1]["mean"],
        "references": trainer.validation.references,
        "final_weights": trainer.state.weights,  # those at the start stand in mixture.json
        "resumed_from": trainer.state.resumed_from,
        **trainer.records("run"),
    }
