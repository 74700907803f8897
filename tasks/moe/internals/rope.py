"""Rotary embeddings as transformers computes them from a config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def frequencies(config: Any) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] and attention factor, by `config.rope_parameters` of a kind with scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    result: tuple[Tensor, float] = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, None)
    return result
