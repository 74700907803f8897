"""The fp32 weights in a checkpoint's files, whole, without an engine."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import plugin
from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch


def read(path: Path, *, params: Pretrain, model: Path) -> dict[str, torch.Tensor]:
    """Every parameter of a checkpoint, whole and in fp32: what Engine.full_weights gave at that step.

    Args:
        path: a checkpoint that this machine wrote; parts of it are read with pickle.
        params: the settings that it was written with.
        model: the split model's folder.
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
        weights.pop("lm_head.weight", None)
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

    from tasks.moe import gate
    from tasks.pretrain import trainable

    with torch.device("meta"):
        like = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, local_files_only=True))
    gate.swap_in(like, gate.read(model))
    if params.noise:
        gate.add_noise(like)
    names = {id(parameter): name for name, parameter in like.named_parameters()}
    weights = {}
    for group, tensors in zip(trainable.groups(like, params), groups, strict=True):
        for parameter, fp32 in zip(group["params"], tensors, strict=True):
            weights[names[id(parameter)]] = fp32
    return weights
