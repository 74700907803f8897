"""A stock router with what training puts into it: a two-layer gate, noise, a selection bias.

The logits come from here. Which experts they choose and how these are weighed is left to the stock class, with its
dtypes. Shapes: T tokens, D hidden, E routed experts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

NOISE_EPSILON = 0.01


class TrainingRouter(nn.Module):
    """Mixed into a stock router's class by `extend`, before it."""

    stock: type[nn.Module]
    top_k: int
    weight: torch.Tensor
    gate: nn.Module | None
    """In the place of the linear map."""
    noise: nn.Linear | None
    """Gives, by softplus, the standard deviation of the noise of training; arXiv 1701.06538, eq. 4."""
    selection_bias: torch.Tensor | None
    """fp32 [E], added to the logits for the choice and never for the weights; arXiv 2408.15664, eq. 3."""
    observers: OrderedDict[int, Callable[..., None]]

    def forward(self, hidden_states: torch.Tensor) -> Any:
        """(logits, weights, choice) as the stock class gives; the logits have the noise, and not the bias."""
        x_TD = hidden_states.flatten(0, -2)
        clean_TE = F.linear(x_TD, self.weight) if self.gate is None else self.gate(x_TD)
        logits_TE, std_TE = clean_TE, None
        if self.training and self.noise is not None:
            std_TE = F.softplus(self.noise(x_TD)) + NOISE_EPSILON
            logits_TE = clean_TE + torch.randn_like(clean_TE) * std_TE
        if self.selection_bias is None:
            output = self._as_stock(logits_TE)
            chose_TE = output[0]
        else:
            chose_TE = logits_TE.float() + self.selection_bias
            output = self._weigh(logits_TE, chose_TE.topk(self.top_k, dim=1).indices)
        for observe in self.observers.values():
            observe(clean_TE, chose_TE, std_TE)
        return output

    def observe(self, function: Callable[..., None]) -> RemovableHandle:
        """Call the function in each forward pass with clean_TE, logits_TE and std_TE of tasks/moe/routing.py."""
        handle = RemovableHandle(self.observers)
        self.observers[handle.id] = function
        return handle

    def _as_stock(self, logits_TX: torch.Tensor) -> Any:
        """What the stock class makes of these logits: it multiplies what it gets by its weight, here the identity."""
        width = logits_TX.shape[1]
        identity_XX = torch.eye(width, dtype=logits_TX.dtype, device=logits_TX.device)
        plain = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return self.stock.forward(SimpleNamespace(**plain | {"weight": identity_XX, "hidden_dim": width}), logits_TX)

    def _weigh(self, logits_TE: torch.Tensor, chosen_TK: torch.Tensor) -> Any:
        """What the stock class would make of these logits had it chosen these experts: it is shown no others."""
        logits_TK, weights_TK, order_TK = self._as_stock(logits_TE.gather(1, chosen_TK))
        chosen_TK = chosen_TK.gather(1, order_TK)
        if not getattr(self, "norm_topk_prob", True):  # then a weight is a share of all, not of the chosen
            weights_TK = logits_TE.softmax(1, dtype=torch.float32).gather(1, chosen_TK).to(weights_TK.dtype)
        return logits_TE.to(logits_TK.dtype), weights_TK, chosen_TK

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        exact_E = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if exact_E is not None and self.selection_bias is not None:  # fp32, whatever the model turns to
            self.selection_bias = exact_E.to(self.selection_bias.device)
        return self


def extend(router: nn.Module) -> TrainingRouter:
    """Turn a stock router into a TrainingRouter in place, or give it back if it is one; it computes what it did."""
    if not isinstance(router, TrainingRouter):
        stock = type(router)  # stays a base class: transformers records router logits by isinstance
        router.__class__ = type("TrainingTopKRouter", (TrainingRouter, stock), {"stock": stock})
        for name in ("gate", "noise"):
            router.register_module(name, None)
        router.register_buffer("selection_bias", None, persistent=False)
        assert isinstance(router, TrainingRouter)
        router.observers = OrderedDict()
    return router
