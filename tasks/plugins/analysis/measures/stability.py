"""How many of a model's choices are those of another model on the same text, such as before training.

Shapes: T tokens, K experts of a token, E routed experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.plugins.analysis.interface import Analysis, Figures
from tasks.plugins.analysis.layer import Layer


def measure(layer: Layer) -> Figures:
    """Share of the same choices: each model on its own hidden states, and this router on the other model's."""
    assert layer.other is not None
    seen, other = layer.text(), layer.other.text()
    own_T = same(seen.chosen_TK, other.chosen_TK, experts=layer.experts)
    again_TK = F.linear(other.inputs_TD, layer.router_ED).topk(layer.top_k, dim=1).indices
    alone_T = same(again_TK, other.chosen_TK, experts=layer.experts)
    detail: dict[str, Any] = {
        what: {
            name: float(own_T[torch.from_numpy(group_T == i)].mean())
            for i, name in enumerate(names)
            if (group_T == i).any()
        }
        for what, (names, group_T) in seen.text.groups().items()
    }
    curves = {"as each model runs": float(own_T.mean()), "the other's hidden states": float(alone_T.mean())}
    return Figures(curves={"share of the same choices": curves}, detail=detail)


def same(first_TK: Tensor, second_TK: Tensor, *, experts: int) -> Tensor:
    """Share of the first's choices that are among the second's, on the CPU: float64 [T]."""
    among_TE = torch.zeros(len(second_TK), experts, dtype=torch.float64, device=second_TK.device)
    among_TE.scatter_(1, second_TK, 1.0)
    return among_TE.gather(1, first_TK.to(among_TE.device)).mean(1).cpu()


ANALYSIS = Analysis(
    title="Stability of the routing",
    note="Share of a token's experts that the first model chooses too, as each model runs; and with this model's "
    "router on the first's hidden states, which leaves what only the router has changed. By chance K / E.",
    needs="another model",
    measure=measure,
)
