"""Losses that keep tokens spread over the experts, and the bias that does it without one.

Each is taken over the tokens of one micro-batch on one rank that are no padding. The loop adds them to the loss of the
micro-batch, and DeepSpeed averages over micro-batches and ranks. Layers: `switch`, `global_batch` and the z-loss are
means over the sparse layers, so that a coefficient does not depend on the depth; `mixtral` is one loss over all layers
joined, as in transformers; `cv2` is the sum over the layers, as in LLaMA-MoE.

transformers counts f in tokens (its f sums to K), so where all layers route alike `mixtral` is K times `switch`: the
router_aux_loss_coef c of a stock config is the coefficient K * c here.

Shapes: T tokens, K experts per token, E routed experts, L sparse layers, R ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.moe import counts, gate, routing
from tasks.moe.routing import Routed
from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch
    from torch import nn


class Balancer:
    """The balance of one model through a run. Every rank has one and makes the same calls in order.

    Per optimizer step: `begin`, `losses` for each micro-batch, `end` after the optimizer has stepped. A step that is
    given up has no `end`.
    """

    def __init__(self, params: Pretrain, model: nn.Module) -> None:
        """Args: model: with its biases already (tasks/moe/gate.py, add_bias) if params.balance.loss is `bias`."""
        import torch

        self._settings = params.balance
        self._model: Any = getattr(model, "module", model)
        sizes = counts.experts(self._model.config)
        self._experts, self._top_k = sizes["experts"], sizes["top_k"]
        device = next(self._model.parameters()).device
        self._mine_LE = torch.zeros(len(sizes["layers"]), self._experts, dtype=torch.int64, device=device)
        self._all_LE = torch.zeros_like(self._mine_LE)

    @property
    def load_LE(self) -> NDArray[np.int64]:
        """This rank's tokens per layer and expert in this step, without padding: int64 [L, E]."""
        return np.asarray(self._mine_LE.cpu().numpy())

    def begin(self) -> None:
        """Start a new optimizer step."""
        self._mine_LE.zero_()
        self._all_LE.zero_()

    def losses(self, routed: list[Routed], *, real_T: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The parts of one micro-batch's loss that act on the routers.

        Args:
            routed: what `routing.record` gives for its forward pass; [] for a dense model.
            real_T: bool; False for padding. None where there is none.

        Returns:
            `balance` and `z`, those that are asked for: fp32 scalars with gradients, times their coefficients.
        """
        import torch

        if not routed:
            return {}
        raise NotImplementedError

    def end(self) -> None:
        """Move the biases, if this is how tokens are spread; all ranks must call it."""
