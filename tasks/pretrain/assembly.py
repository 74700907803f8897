"""What computes a training step: a model in the engine, with the losses of the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from tasks.pretrain.engine.interface import Engine
    from tasks.pretrain.loss.distil import Distiller
    from tasks.pretrain.loss.objective import Objective


def precision(params: Pretrain, device: torch.device) -> torch.dtype:
    """The training dtype for `pretrain.precision`; auto is bfloat16 where the device multiplies it."""
    import torch

    from tasks.moe.device import has_bfloat16

    bfloat16 = has_bfloat16(device.type) if params.precision == "auto" else params.precision == "bfloat16"
    return torch.bfloat16 if bfloat16 else torch.float32


def build(model: PreTrainedModel, params: Pretrain, *, distiller: Distiller | None) -> tuple[Engine, Objective]:
    """Put a model into the engine, with the losses of the settings around it.

    Raises:
        TrainingError: the settings ask for what the model or DeepSpeed cannot do.
    """
    from tasks.architectures import is_moe
    from tasks.moe.internals import layers
    from tasks.pretrain.engine import interface
    from tasks.pretrain.loss import balance
    from tasks.pretrain.loss.objective import Objective

    balance.attach_routers(model, params)
    model.train()
    if params.gradient_checkpointing:
        layers.recompute_activations(model)
    engine = interface.build(model, params)
    balancer = balance.Balancer(params, engine.module) if is_moe(model.config) else None
    return engine, Objective(params, engine, balancer=balancer, distiller=distiller)
