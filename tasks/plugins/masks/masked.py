"""Masks on the units of a dense model: the forward pass of a model from which layers, heads, neurons and hidden
dimensions are cut, before any is cut.

    attach(model, lambda: keep)

A mask is 0 for what is cut, and a factor for what stays. A dense model with factors computes what the cut model
computes whose weights have them folded in (shrink.py), at any values, tied or not:

    residual stream    the embedding and the outputs of attention and FFN times hidden_D; the last two times their
                       layer_L too. A dimension that is cut is 0 everywhere.
    RMSNorm            the variance is the mean over the dimensions that stay (arXiv 2310.06694, its code)
    head               reads the final norm times hidden_D, so that a tied matrix is folded once, as the embedding's
    attention          what a group of heads gives o_proj, times group_LK; a group has one head of keys and values
    FFN                what a neuron gives down_proj, times neuron_LN

Shapes: B windows, T tokens of one, L layers, K groups of heads, N neurons, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Keep:
    """The masks of a model; None where a kind of unit stays whole."""

    layer_L: Tensor | None = None
    group_LK: Tensor | None = None
    neuron_LN: Tensor | None = None
    hidden_D: Tensor | None = None

    def written(self, layer: int) -> Tensor | None:
        """What the outputs of a layer's attention and FFN are multiplied by."""
        if self.layer_L is None:
            return self.hidden_D
        return self.layer_L[layer] if self.hidden_D is None else self.layer_L[layer] * self.hidden_D

    def binary(self) -> Keep:
        """The same units, with the factor 1."""
        return Keep(**{name: None if mask is None else (mask != 0).to(mask) for name, mask in vars(self).items()})


def attach(model: Any, keep: Callable[[], Keep]) -> None:
    """Let a dense causal language model run masked from now on; `keep` gives the masks of the moment."""
    base = model.base_model
    base.embed_tokens.register_forward_hook(lambda _module, _args, out: _times(out, keep().hidden_D))
    for i, block in enumerate(base.layers):
        attach_to_layer(block, i, keep)
    attach_to_norm(base.norm, keep)
    base.norm.register_forward_hook(lambda _module, _args, out: _times(out, keep().hidden_D))


def attach_to_layer(block: Any, layer: int, keep: Callable[[], Keep]) -> None:
    """Mask one decoder layer, the number `layer` of its model; what it reads has 0 for hidden dimensions cut."""

    def heads(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        masks = keep().group_LK
        if masks is None:
            return None
        width = args[0].shape[-1] // masks.shape[1]
        return (_times(args[0], masks[layer].repeat_interleave(width)),)

    def neurons(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        masks = keep().neuron_LN
        return None if masks is None else (_times(args[0], masks[layer]),)

    for linear, units in ((block.self_attn.o_proj, heads), (block.mlp.down_proj, neurons)):
        linear.register_forward_pre_hook(units)
        linear.register_forward_hook(lambda _module, _args, out: _times(out, keep().written(layer)))
    attach_to_norm(block.input_layernorm, keep)
    attach_to_norm(block.post_attention_layernorm, keep)


def attach_to_norm(norm: Any, keep: Callable[[], Keep]) -> None:
    """Let an RMSNorm over the hidden dimensions take its variance over those that stay."""
    stock = norm.forward

    def forward(x_BTD: Tensor) -> Tensor:
        hidden_D = keep().hidden_D
        if hidden_D is None:
            whole: Tensor = stock(x_BTD)
            return whole
        x32_BTD = x_BTD.float()
        variance = x32_BTD.square().sum(-1, keepdim=True) / hidden_D.count_nonzero()
        scaled: Tensor = norm.weight * (x32_BTD * torch.rsqrt(variance + norm.variance_epsilon)).to(x_BTD.dtype)
        return scaled

    norm.forward = forward


def _times(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask.to(values)
