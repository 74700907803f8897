"""The DeepSpeed engine: process group, precision, configuration, optimizer step, full weights.

Nothing here needs a compiler: the optimizer is torch's fused AdamW, and DeepSpeed's shared-memory collectives, which
it would build with g++ at the first collective, are switched off.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel

_BUILD_SIGNS = ("ninja", "jit load", "cuda_home", "error building extension", "missingcuda", "compiler", "nvcc")
_FIRST_MICRO_STEP = {1: -1, 2: -1, 3: 0}
"""What DeepSpeed's count of micro-batches stands at before the first one, by ZeRO stage."""
BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once at most: its default, of which it allocates all, however small the model."""


def initialise(workspace: Path) -> tuple[int, int, torch.device]:
    """Join the process group: nccl with CUDA, gloo without. Returns (rank, world size, device).

    A single process meets itself in memory and needs no port; several find each other through torchrun's variables.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str((workspace / "torch_extensions").resolve()))
    import torch

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls old names
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend)
    else:
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def precision(setting: str, device: torch.device) -> torch.dtype:
    """The training dtype for `pretrain.precision`; auto is bfloat16 where the processor multiplies it."""
    import torch

    if setting != "auto":
        return torch.bfloat16 if setting == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if cpu_has_bfloat16(Path("/proc/cpuinfo")) else torch.float32


def cpu_has_bfloat16(cpuinfo: Path) -> bool:
    """True if the processor has bfloat16 products; without them oneDNN's bfloat16 is slower than float32."""
    if not cpuinfo.exists():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())


def configuration(params: Pretrain, *, world_size: int, dtype: torch.dtype, model_type: str = "") -> dict[str, Any]:
    """The effective DeepSpeed configuration, as JSON.

    Args:
        model_type: of the model's config; asked for by expert parallelism alone.

    Raises:
        TrainingError: settings that DeepSpeed cannot follow together.
    """
    import torch

    from tasks.pretrain.engine import expert_parallel

    bfloat16, cuda = dtype == torch.bfloat16, torch.cuda.is_available()
    accumulation = params.batch // (params.micro_batch * world_size)
    zero: dict[str, Any] = {"stage": params.zero_stage, "overlap_comm": cuda}
    if params.offload:
        if params.zero_stage == 0:
            raise TrainingError(
                "pretrain.offload: true needs zero_stage 1, 2 or 3: without ZeRO, DeepSpeed keeps the optimizer where "
                "the weights are"
            )
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        if params.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    config: dict[str, Any] = {
        "train_batch_size": params.batch,
        "train_micro_batch_size_per_gpu": params.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": params.clip,
        "bf16": {"enabled": bfloat16},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "torch_adam": True,  # DeepSpeed's own are compiled at the first start
                "fused": True,
                "lr": params.learning_rate,
                "betas": list(params.betas),
                "weight_decay": params.weight_decay,
            },
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }
    if bfloat16 and accumulation > 1 and params.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # bfloat16 sums of many micro-batches lose the small ones
    if experts := expert_parallel.configuration(params, model_type=model_type):
        config["expert_parallel"] = experts
    return config


def build(model: PreTrainedModel, params: Pretrain, *, config: dict[str, Any]) -> DeepSpeedEngine:
    """Wrap the model, freeze in it what no phase trains, and fit the buckets of `config` to its size.

    Raises:
        TrainingError: DeepSpeed asks for a compiler that is not there, or the settings ask for parts that the model
            does not have.
    """
    import deepspeed

    from tasks.moe import gate
    from tasks.pretrain import trainable
    from tasks.pretrain.engine import expert_parallel

    trainable.freeze(model, params)
    if params.zero_stage == 3 and params.train != "all":
        # Where nothing before a module is trained, DeepSpeed frees its weights before their gradients are taken.
        model.enable_input_require_grads()
    groups = trainable.groups(model, params)
    expert_parallel.check(model, params)
    bucket = min(BUCKET, sum(parameter.numel() for parameter in model.parameters()))
    config["zero_optimization"] |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    biases = gate.biases(model)
    try:
        with _quiet(), expert_parallel.conversion(params, config):
            engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    except (RuntimeError, OSError, ImportError) as error:
        if message := needs_compiler(error):
            raise TrainingError(message) from error
        raise
    expert_parallel.prepare(engine, biases=biases)
    _forget_first_step(engine)
    trainable.prepare(engine.basic_optimizer)
    return engine


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide DeepSpeed's prints of the memory around each optimizer group, and make cheap what goes before them.

    That is a collection of the whole process's garbage, a quarter of a second each with transformers imported.
    """
    gc.freeze()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        gc.unfreeze()


def _forget_first_step(engine: DeepSpeedEngine) -> None:
    """Undo the step with zero gradients that stage 0 in bfloat16 takes to make its moments.

    It decays the masters once at the full rate, and counts as a step in the correction of the moments.
    """
    if hasattr(engine.optimizer, "fp32_groups"):
        engine.basic_optimizer.state.clear()
        for low, high in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            for parameter, master in zip(low, high, strict=True):
                master.data.copy_(parameter.data)


def needs_compiler(error: BaseException) -> str | None:
    """The message for an error by which DeepSpeed says that it could not build an operator, or None."""
    text = f"{type(error).__name__}: {error}"
    if not any(sign in text.lower() for sign in _BUILD_SIGNS):
        return None
    return (
        f"DeepSpeed wants to compile an operator and cannot ({text.splitlines()[0]}). Install a C++ "
        "compiler and ninja (Debian: apt-get install g++ ninja-build), with CUDA its toolkit too, then run again"
    )


def finish_step(engine: DeepSpeedEngine) -> float:
    """Take the optimizer step after the last micro-batch's backward pass, if the gradient is finite.

    Returns:
        The norm of the whole gradient before clipping, the same on every rank. If it is not finite, weights and
        optimizer are as they were, and the gradients are forgotten.
    """
    import torch

    norm = None
    if not engine.zero_optimization() and not engine.bfloat16_enabled():  # the one case where DeepSpeed has no norm
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            discard_step(engine)
            return norm
    engine.step()
    if not engine.was_step_applied():
        discard_step(engine)  # with offload, DeepSpeed would add the next gradients to these
        return float("nan")
    return float(engine.get_global_grad_norm()) if norm is None else norm


def discard_step(engine: DeepSpeedEngine) -> None:
    """Forget the gradients of this optimizer step's micro-batches: the next one begins as if they had not been.

    To be called after a backward pass and before `finish_step`, by all ranks, at any micro-batch.
    """
    optimizer = engine.optimizer
    engine.zero_grad()
    if hasattr(optimizer, "micro_step_id"):  # ZeRO 1, 2 and 3 keep sums of their own
        optimizer.zero_grad()
        optimizer.micro_step_id = _FIRST_MICRO_STEP[engine.zero_optimization_stage()]
        optimizer.reset_cpu_buffers()
        for sums in (optimizer.averaged_gradients, getattr(optimizer, "all_grad_tensors", {})):
            sums.update(dict.fromkeys(sums))
    elif engine.bfloat16_enabled():
        optimizer.zero_grad()
    engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()


def full_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor] | None:
    """Every parameter whole and in fp32, from the master weights: on rank 0, by name, on the CPU; None elsewhere.

    All ranks must call it. A tied parameter comes under its first name.
    """
    import torch

    from tasks.pretrain.engine import expert_parallel, fp32_weights

    if expert_parallel.active(engine):
        return expert_parallel.full_weights(engine)
    optimizer = engine.optimizer
    beside: dict[int, torch.Tensor] = {}
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in bfloat16 keeps its masters beside the parameters
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            beside |= {id(parameter): master for parameter, master in zip(low, high, strict=True)}
    weights = {}
    for name, parameter in engine.module.named_parameters():
        whole = beside.get(id(parameter))
        if whole is None:
            whole = fp32_weights.full(parameter)
        if torch.distributed.get_rank() == 0:
            weights[name] = whole.detach().to("cpu", torch.float32, copy=True)
    return weights if torch.distributed.get_rank() == 0 else None


def close() -> None:
    """Leave the process group, if there is one, and let DeepSpeed forget the groups that it made of it."""
    from deepspeed import comm

    if comm.is_initialized():
        comm.destroy_process_group()
