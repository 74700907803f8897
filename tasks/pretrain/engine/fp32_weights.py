"""The fp32 weights that the optimizer of a running engine keeps, whole, wherever ZeRO has put them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from torch import nn


def full(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's fp32 weights under ZeRO; the parameter itself if it is never trained and has none."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    sharded: Any = getattr(parameter, "_z3_optimizer", None)
    if sharded is None or sharded.get_param_id(parameter) in sharded.grad_position:
        active = parameter.requires_grad
        parameter.requires_grad_(True)  # stage 3 denies the fp32 weights of what a phase leaves out
        fp32: torch.Tensor | None = safe_get_full_fp32_param(parameter)
        parameter.requires_grad_(active)
        if fp32 is not None:
            return fp32.detach()
    if sharded is None:
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def full_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor] | None:
    """Every parameter, whole and in fp32: on rank 0, by name, on the CPU; None elsewhere. All ranks must call it."""
    import torch

    optimizer = engine.optimizer
    beside: dict[int, torch.Tensor] = {}
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in bfloat16 keeps them beside the parameters
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            beside |= {id(parameter): fp32 for parameter, fp32 in zip(low, high, strict=True)}
    weights = {}
    for name, parameter in engine.module.named_parameters():
        whole = beside.get(id(parameter))
        if whole is None:
            whole = full(parameter)
        if torch.distributed.get_rank() == 0:
            weights[name] = whole.detach().to("cpu", torch.float32, copy=True)
    return weights if torch.distributed.get_rank() == 0 else None
