"""The fp32 weights of the optimizer, whole: of a running engine, wherever ZeRO has put them, or of a checkpoint."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import layout, plugin
from tasks.settings import Pretrain

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


def read(path: Path, *, params: Pretrain, model: Path) -> dict[str, torch.Tensor]:
    """Every parameter of a checkpoint, whole and in fp32: what Engine.full_weights gave at that step.

    Args:
        path: a checkpoint that this machine wrote; parts of it are read with pickle.
        params: the settings that it was written with.
        model: the converted model's folder.
    """
    from tasks.pretrain.engine import checkpoint_writer

    others = (module.read(path, params=params, model=model) for module in plugin.modules("engine").values())
    if (weights := next((other for other in others if other is not None), None)) is not None:
        pass
    elif params.zero_stage == 3:
        weights = _zero_3(path)
    else:
        state = checkpoint_writer.load(path / "mp_rank_00_model_states.pt")
        weights = {name: tensor.float() for name, tensor in state["module"].items()}  # of what is never trained, too
        if params.zero_stage:
            weights |= {name: flat.view(weights[name].shape) for name, flat in _zero_1_and_2(path).items()}
        elif "fp32_groups" in state["optimizer"]:  # bfloat16
            weights |= _zero_0(state["optimizer"]["fp32_groups"], params=params, model=model)
    if json.loads((model / "config.json").read_text()).get("tie_word_embeddings"):
        weights.pop(layout.HEAD, None)
    return weights


def _zero_3(path: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name)
    return weights


def _zero_1_and_2(path: Path) -> dict[str, torch.Tensor]:
    """Flat weights: each rank has a piece of every group, and says which parameters' parts stand where in it."""
    import torch

    from tasks.pretrain.engine import checkpoint_writer

    pieces: dict[str, list[torch.Tensor]] = {}
    ranks = {int(re.findall(r"pp_rank_(\d+)", file.name)[0]): file for file in path.glob("*_optim_states.pt")}
    for _, file in sorted(ranks.items()):
        shard = checkpoint_writer.load(file)["optimizer_state_dict"]
        for flat, slices in zip(shard["single_partition_of_fp32_groups"], shard["param_slice_mappings"], strict=True):
            for name, piece in slices.items():
                pieces.setdefault(name, []).append(flat.narrow(0, piece.start, piece.numel))
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _zero_0(groups: Any, *, params: Pretrain, model: Path) -> dict[str, torch.Tensor]:
    """Those beside bfloat16 weights, in the order of the optimizer's groups."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tasks.moe import block, gate
    from tasks.pretrain import trainable

    with torch.device("meta"):
        like = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, local_files_only=True))
    block.swap_in(like, model)
    if params.noise:
        gate.add_noise(like)
    names = {id(parameter): name for name, parameter in like.named_parameters()}
    weights = {}
    for group, tensors in zip(trainable.groups(like, params), groups, strict=True):
        for parameter, fp32 in zip(group["params"], tensors, strict=True):
            weights[names[id(parameter)]] = fp32
    return weights
