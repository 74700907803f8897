"""The DeepSpeed engine: process group, precision, parameter groups, configuration, full weights.

Nothing here needs a compiler: the optimizer is torch's fused AdamW, and DeepSpeed's shared-memory collectives, which
it would build with g++ at the first collective, are switched off.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from torch import nn

_BUILD_SIGNS = ("ninja", "jit load", "cuda_home", "error building extension", "missingcuda", "compiler", "nvcc")


def initialise(workspace: Path) -> tuple[int, int, torch.device]:
    """Join the process group: nccl with CUDA, gloo without. Returns (rank, world size, device).

    A single process meets itself in memory and needs no port; several find each other through torchrun's variables.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str((workspace / "torch_extensions").resolve()))
    import torch

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


def configuration(params: Pretrain, *, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The effective DeepSpeed configuration."""
    import torch

    bfloat16 = dtype == torch.bfloat16
    accumulation = params.batch // (params.micro_batch * world_size)
    config: dict[str, Any] = {
        "train_batch_size": params.batch,
        "train_micro_batch_size_per_gpu": params.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": params.clip,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": {"stage": params.zero_stage, "overlap_comm": torch.cuda.is_available()},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }
    if bfloat16 and accumulation > 1 and params.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # bfloat16 sums of many micro-batches lose the small ones
    return config


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: matrices with weight decay; norms, biases, routers and embeddings without.

    A router's logits have no scale to spare, and the embedding of a token that the corpus lacks would only shrink.
    """
    from torch import nn

    free: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Router"):
            free |= {id(parameter) for parameter in module.parameters()}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():  # a tied matrix comes once
        (kept if id(parameter) in free or parameter.ndim < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build(model: nn.Module, params: Pretrain, *, config: dict[str, Any]) -> DeepSpeedEngine:
    """Wrap the model. Raises TrainingError when DeepSpeed asks for a compiler that is not there."""
    import deepspeed
    import torch

    groups = parameter_groups(model, params.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=params.learning_rate, betas=params.betas, fused=True)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except (RuntimeError, OSError, ImportError) as error:
        if message := needs_compiler(error):
            raise TrainingError(message) from error
        raise
    return engine


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
    """Take the optimizer step after the last micro-batch.

    Returns:
        The norm of the whole gradient before clipping; NaN if DeepSpeed skipped the step because of an overflow.
    """
    import torch

    norm = None
    if not engine.zero_optimization() and not engine.bfloat16_enabled():  # the one case where DeepSpeed keeps none
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    if not engine.was_step_applied():
        return float("nan")
    return float(engine.get_global_grad_norm() if norm is None else norm)


def full_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor] | None:
    """Every parameter whole and in fp32, from the master weights: on rank 0, by name, on the CPU; None elsewhere.

    All ranks must call it. A tied parameter comes under its first name.
    """
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer = engine.optimizer
    masters: dict[int, torch.Tensor] = {}
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in bfloat16 keeps its masters beside the parameters
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= {id(parameter): master for parameter, master in zip(low, high, strict=True)}
    weights = {}
    for name, parameter in engine.module.named_parameters():
        master = masters.get(id(parameter))
        if master is None:
            master = safe_get_full_fp32_param(parameter)
        if torch.distributed.get_rank() == 0:
            weights[name] = (parameter if master is None else master).detach().to("cpu", torch.float32, copy=True)
    return weights if torch.distributed.get_rank() == 0 else None


def close() -> None:
    """Leave the process group."""
    import torch

    with contextlib.suppress(AssertionError):  # never joined
        torch.distributed.destroy_process_group()
