"""A short run of the training step, to measure what a step costs on this machine.

    python -m tasks.tools.calibrate FOLDER        # one process of it; `measure` starts all

The model of the settings with random weights, in the engine and with the losses that a run has: WARM_UP steps that are
not timed, then TIMED ones of up to two micro-batches. FOLDER has ask.json and gets speed.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import scratch
from tasks.pretrain.job import TrainingError
from tasks.pretrain.launch import launcher
from tasks.settings import Pretrain
from tasks.tools.estimate import Speed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from tasks.corpus.sampling.loader import Batch
    from tasks.pretrain.loss.distil import Distiller

WARM_UP, TIMED = 2, 3


def measure(config: dict[str, Any], params: Pretrain, *, parent: dict[str, Any] | None = None) -> Speed:
    """Run the steps and return what they took.

    As many processes run as the settings say if they would run on this machine, else one.

    Args:
        config: config.json of the split model; parent: of the dense one, if `distill` asks for it.

    Raises:
        TrainingError: they failed; the message has their last words.
    """
    processes = params.processes if params.launcher == "local" else 1
    micro_batches = min(2, params.batch // (params.micro_batch * params.processes))
    run = params.model_dump() | {
        "processes": processes,
        "expert_parallel": params.expert_parallel if processes > 1 else 1,
        "launcher": "local",
        "hostfile": None,
        "batch": micro_batches * params.micro_batch * processes,
    }
    with tempfile.TemporaryDirectory() as folder:
        ask = {"config": config, "parent": parent, "params": run, "begun": time.time()}
        (Path(folder) / "ask.json").write_text(json.dumps(ask))
        shape = params.model_copy(update={"processes": processes, "launcher": "local"})
        done = subprocess.run(
            launcher.torchrun(["tasks.tools.calibrate", folder], processes=processes),
            env=launcher.launcher_environment(shape, os.environ),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise TrainingError(f"the calibration run failed ({last}); `moeforge plan` without --calibrate needs none")
        return Speed(**json.loads((Path(folder) / "speed.json").read_text()))


def run(folder: Path) -> None:
    """One process of the calibration; rank 0 writes folder/speed.json."""
    import torch

    from tasks.moe import allocator
    from tasks.pretrain import assembly
    from tasks.pretrain.engine import distributed
    from tasks.pretrain.log import meters

    ask = json.loads((folder / "ask.json").read_text())
    params = Pretrain(**ask["params"])
    rank, world_size, device = distributed.join(folder)
    try:
        allocator.keep_buffers()
        dtype = assembly.precision(params, device)
        model = random_model(ask["config"], dtype=dtype, device=device)
        distiller = _distiller(ask["parent"], params, dtype=dtype, device=device)
        engine, objective = assembly.build(model, params, distiller=distiller)
        start = time.time() - ask["begun"]
        batch = random_batch(params, rows=params.batch // world_size, vocabulary=model.config.vocab_size)
        seconds = _steps(engine, objective, batch, params, device=device)

        def evaluate() -> None:
            with torch.no_grad():
                engine.module(input_ids=torch.from_numpy(batch.input_ids[:1]).to(device), use_cache=False)

        peak = meters.memory(device)["rss_peak"]
        states = torch.empty(1 << 24, device=device)
        figures = {
            "start": start,
            **{name: statistics.median(times) for name, times in seconds.items()},
            "evaluation": _time(evaluate, device),
            "copy": _time(lambda: states.to("cpu", copy=True), device) / states.nbytes,
        }
        figures["peak"] = torch.cuda.max_memory_reserved() if device.type == "cuda" else peak
        slowest = torch.tensor(list(figures.values()), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
        if rank == 0:
            measured = dict(zip(figures, slowest.tolist(), strict=True))
            speed = Speed(**measured | {"peak": int(measured["peak"]), "processes": world_size})
            scratch.write_json(folder / "speed.json", asdict(speed))
    finally:
        distributed.leave()


def random_model(config: dict[str, Any], *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of a config.json with random weights, computed as a loaded one is (tasks/moe/checkpoint.py)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tasks.architectures import is_moe

    options: dict[str, Any] = {}
    if is_moe(config):
        import moe_kernels

        moe_kernels.register()
        options["experts_implementation"] = "moe_kernels"
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=dtype, **options
        )
    return model


def random_batch(params: Pretrain, *, rows: int, vocabulary: int) -> Batch:
    """Full windows of one document each, of random ids."""
    import numpy as np

    from tasks.corpus.sampling.loader import Batch

    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, params.seq_len))
    return Batch(
        input_ids=ids,
        labels=ids,
        position_ids=np.tile(np.arange(params.seq_len), (rows, 1)) if params.mask_documents else None,
        cu_seqlens=np.arange(rows + 1, dtype=np.int32) * params.seq_len,
        domains=["random"] * rows,
        windows=list(range(rows)),
        step_targets=params.batch * (params.seq_len - 1),
    )


def _distiller(
    parent: dict[str, Any] | None, params: Pretrain, *, dtype: torch.dtype, device: torch.device
) -> Distiller | None:
    """The parent in memory; none where its logits would be read from shards, which takes next to no time."""
    from tasks.pretrain.loss.distil import Distiller
    from tasks.pretrain.loss.teacher import Teacher

    if parent is None or params.distill is None or params.distill.top_n is not None:
        return None
    return Distiller(params.distill, Teacher(random_model(parent, dtype=dtype, device=device)))


def _steps(engine: Any, objective: Any, batch: Batch, params: Pretrain, *, device: torch.device) -> dict[str, Any]:
    """Seconds of each timed micro-batch (forward and backward) and of each timed optimizer step."""
    seconds: dict[str, list[float]] = {"micro_batch": [], "optimizer": []}
    rows = range(0, len(batch.input_ids), params.micro_batch)
    for step in range(WARM_UP + TIMED):
        if objective.balancer:
            objective.balancer.begin()
        for start in rows:

            def pass_through(start: int = start) -> None:
                losses = objective(batch, rows=slice(start, start + params.micro_batch), device=device)
                engine.backward(losses.total)
                if start != rows[-1]:
                    engine.next_micro_batch()

            took = _time(pass_through, device)
            if step >= WARM_UP:
                seconds["micro_batch"].append(took)
        took = _time(engine.finish_step, device)
        if step >= WARM_UP:
            seconds["optimizer"].append(took)
    return seconds


def _time(work: Callable[[], Any], device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    run(Path(sys.argv[1]))
