"""The fp32 weights that an optimizer keeps, whole, wherever ZeRO has put them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def full(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's master under ZeRO, whole; the parameter itself, whole, if it is never trained and has none."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    sharded: Any = getattr(parameter, "_z3_optimizer", None)
    if sharded is None or sharded.get_param_id(parameter) in sharded.grad_position:
        active = parameter.requires_grad
        parameter.requires_grad_(True)  # stage 3 denies the master of what a phase leaves out
        master: torch.Tensor | None = safe_get_full_fp32_param(parameter)
        parameter.requires_grad_(active)
        if master is not None:
            return master.detach()
    if sharded is None:
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
