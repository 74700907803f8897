"""The units of a dense model that can be cut, the tensors that each has a part of, and which of them are kept.

Units: layers; groups of heads, which are a head of keys and values with the query heads that read it; neurons of an
FFN; hidden dimensions.

Shapes: L layers, K groups of heads, N neurons, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tasks import layout
from tasks.moe.streamed import Streamed
from tasks.plugins.masks import module
from tasks.plugins.masks.masked import Keep

Axis = Literal["hidden", "queries", "keys", "neurons"]
AXES: Mapping[str, tuple[Axis | None, ...]] = {
    "embed_tokens.weight": (None, "hidden"),
    "lm_head.weight": (None, "hidden"),
    "norm.weight": ("hidden",),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "q_proj.weight": ("queries", "hidden"),
    "k_proj.weight": ("keys", "hidden"),
    "v_proj.weight": ("keys", "hidden"),
    "o_proj.weight": ("hidden", "queries"),
    "q_proj.bias": ("queries",),
    "k_proj.bias": ("keys",),
    "v_proj.bias": ("keys",),
    "o_proj.bias": ("hidden",),
    "q_norm.weight": (None,),
    "k_norm.weight": (None,),
    "gate_proj.weight": ("neurons", "hidden"),
    "up_proj.weight": ("neurons", "hidden"),
    "down_proj.weight": ("hidden", "neurons"),
    "gate_proj.bias": ("neurons",),
    "up_proj.bias": ("neurons",),
    "down_proj.bias": ("hidden",),
}
"""The axes of each tensor of a dense model."""


def axes(name: str) -> tuple[Axis | None, ...]:
    """The axes of a tensor, by its name. Raises ValueError for one that no dense class here has."""
    try:
        return AXES[".".join(name.split(".")[-2:])]
    except KeyError:
        raise ValueError(f"{name}: its axes are not known; add it to AXES in tasks/plugins/masks/units.py") from None


def sizes(config: Any) -> dict[str, int]:
    """The sizes of a model, by the config fields of what can be cut."""
    return {field: getattr(config, field) for field in module.UNITS}


def random(config: Any, shape: Mapping[str, int], *, seed: int) -> Keep:
    """Any units, as many as the shape has."""
    generator = torch.Generator().manual_seed(seed)
    return _largest({mask: torch.rand(dims, generator=generator) for mask, dims in _dims(config).items()}, shape)


@torch.no_grad()
def magnitude(parent: Streamed, shape: Mapping[str, int]) -> Keep:
    """The units with the largest sum of squares of all their weights."""
    scores = {mask: torch.zeros(dims, dtype=torch.float64) for mask, dims in _dims(parent.config).items()}
    groups = parent.config.num_key_value_heads
    for name in parent.stored:
        square, layer = parent.tensor(name).double().square(), layout.layer_of(name)
        if layer is not None:
            scores["layer_L"][layer] += square.sum()
        for dim, axis in enumerate(axes(name)):
            along = square.sum([other for other in range(square.ndim) if other != dim])
            if axis == "hidden":
                scores["hidden_D"] += along
            elif axis == "neurons":
                scores["neuron_LN"][layer] += along
            elif axis is not None:
                scores["group_LK"][layer] += along.view(groups, -1).sum(1)
    return _largest(scores, shape)


def learned(folder: Path, shape: Mapping[str, int]) -> Keep:
    """The units with the largest logits beside a checkpoint, each with the factor that its mask stands for."""
    kept = _fields(shape)
    return Keep(**{mask: module.chosen(logits, kept[mask]) for mask, logits in module.read(folder).items()})


def _largest(scores: Mapping[str, Tensor], shape: Mapping[str, int]) -> Keep:
    """The units with the largest scores, with the factor 1; kinds of which all are kept are left out."""
    masks: dict[str, Tensor] = {}
    for mask, count in _fields(shape).items():
        score = scores[mask]
        if count < score.shape[-1]:
            order = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
            masks[mask] = torch.zeros(score.shape).scatter(-1, order, 1.0)
    return Keep(**masks)


def _fields(shape: Mapping[str, int]) -> dict[str, int]:
    return {mask: shape[field] for field, mask in module.UNITS.items()}


def _dims(config: Any) -> dict[str, list[int]]:
    own, layers = sizes(config), config.num_hidden_layers
    return {
        "layer_L": [layers],
        "group_LK": [layers, own["num_key_value_heads"]],
        "neuron_LN": [layers, own["intermediate_size"]],
        "hidden_D": [own["hidden_size"]],
    }
