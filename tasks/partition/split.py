"""The split of all layers, bottom up: each is fitted on what the already converted layers below hand it.

Shapes: T calibration tokens, D hidden, N neurons of the dense FFN, E routed experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tasks.partition import activation, build, calibration, random_split, router

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from tasks.settings import Partition

ADDED = 0.05
"""Most that unequal weights of the chosen experts may add to a layer's squared error, as a share of it."""
_PROBE = 0.01  # share of the router's size at which its effect on the weights is still linear
_TEMPER_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Split:
    """Neuron indices and router weights per layer; `errors` is the share of each FFN's output energy that is lost."""

    layers: tuple[np.ndarray, ...]
    routers: list[torch.Tensor]
    errors: list[float]


def at_random(dense: LlamaForCausalLM, partition: Partition) -> Split:
    """Random experts and random routers; needs no text.

    The router's logits get the standard deviation `router_std` for an input as RMSNorm leaves it.
    """
    layers, routers = [], []
    for i, block in enumerate(dense.model.layers):
        width, hidden = dense.config.intermediate_size, dense.config.hidden_size
        layers.append(random_split.split_layer(width, experts=partition.experts, seed=partition.seed, layer=i))
        weight_ED = router.random_weights(partition.experts, hidden, seed=partition.seed, layer=i)
        norm: Any = block.post_attention_layernorm.weight
        length = norm.detach().float().norm().cpu()  # of a typical input: RMSNorm makes its root mean square 1
        routers.append(weight_ED * (partition.router_std / (router.INIT_STD * length)))
    return Split(layers=tuple(layers), routers=routers, errors=[])


@torch.no_grad()
def by_activation(
    dense: LlamaForCausalLM, ids_BL: np.ndarray, *, partition: Partition, report: Callable[[str], None]
) -> Split:
    """Shared experts, clusters and fitted routers from calibration windows `ids_BL`."""
    states = calibration.States(dense, ids_BL)
    layers, routers, errors = [], [], []
    for i, block in enumerate(dense.model.layers):
        x_TD = states.attend(i)
        down_DN = block.mlp.down_proj.weight
        h_TN = calibration.neurons(block.mlp, x_TD)
        dense_TD = h_TN @ down_DN.T
        experts_EF, weight_ED = activation.split_layer(
            x_TD,
            h_TN,
            down_DN,
            experts=partition.experts,
            shared_experts=partition.shared_experts,
            top_k=partition.top_k,
            seed=partition.seed + i,
        )
        ffn = _Converted(x_TD, h_TN, down_DN, experts_EF, partition)
        weight_ED = ffn.tempered(router.scaled(weight_ED, x_TD, std=partition.router_std), dense_TD)
        sparse_TD = ffn.output(weight_ED)
        error = ((dense_TD - sparse_TD).square().sum() / dense_TD.square().sum()).item()
        states.add(sparse_TD)
        layers.append(experts_EF)
        routers.append(weight_ED)
        errors.append(error)
        report(f"{error:.1%} of the FFN's output lost")
    return Split(layers=tuple(layers), routers=routers, errors=errors)


class _Converted:
    """One converted FFN, computed from the dense one's neurons: experts are masks over them."""

    def __init__(
        self,
        x_TD: torch.Tensor,
        h_TN: torch.Tensor,
        down_DN: torch.Tensor,
        experts_EF: np.ndarray,
        partition: Partition,
    ) -> None:
        self._x_TD, self._h_TN, self._down_DN, self._partition = x_TD, h_TN, down_DN, partition
        of_row = np.arange(len(experts_EF)) - partition.shared_experts
        of_row[of_row < 0] = partition.experts
        group_N = np.empty(experts_EF.size, dtype=np.int64)
        group_N[experts_EF.reshape(-1)] = np.repeat(of_row, experts_EF.shape[1])
        self._group_N = torch.from_numpy(group_N).to(x_TD.device)

    def output(self, weight_ED: torch.Tensor, *, tokens: int | None = None) -> torch.Tensor:
        """Neurons' outputs, each weighted by its expert's routing weight: [T, D], of the first `tokens` if given."""
        x_TD, h_TN = self._x_TD[:tokens], self._h_TN[:tokens]
        index_TK, weights_TK = router.chosen(weight_ED, x_TD, top_k=self._partition.top_k)
        weights_TG = torch.zeros(len(x_TD), self._partition.experts + 1, device=x_TD.device)
        weights_TG.scatter_(1, index_TK, weights_TK * build.scale(self._partition))
        weights_TG[:, -1] = 1  # the shared experts
        return (h_TN * weights_TG[:, self._group_N]) @ self._down_DN.T

    def tempered(self, weight_ED: torch.Tensor, dense_TD: torch.Tensor) -> torch.Tensor:
        """Shrink the router until the spread of its weights adds no more than `ADDED` to the error of the choice.

        Where a few tokens carry most of a layer's output, as the first token of a text does in lower layers, their
        logits lie so far apart that some weights are several times 1/K, and the output error is several times the
        output. To first order the weights' part of the error grows with the square of the logits.
        """
        even_ED = weight_ED * _PROBE**2
        even_TD = self.output(even_ED, tokens=_TEMPER_TOKENS)
        moved_TD = self.output(weight_ED * _PROBE, tokens=_TEMPER_TOKENS) - even_TD
        allowed = (ADDED * (dense_TD[:_TEMPER_TOKENS] - even_TD).square().sum()).sqrt()
        return weight_ED * min(1.0, (_PROBE * allowed / moved_TD.norm().clamp_min(1e-12)).item())
