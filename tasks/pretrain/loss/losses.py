"""What an objective gives the trainer for one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.sampling.loader import IGNORED

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of one forward pass."""

    nats_B: torch.Tensor
    """The cross-entropy of each window, fp32, the sum over its predicted tokens."""
    parts: dict[str, torch.Tensor]
    """The other terms of `total`, times their coefficients: [B], sums over a window's predicted tokens, or a scalar
    for the whole micro-batch."""
    total: torch.Tensor
    """To be differentiated: the micro-batch's share of the step, times the number of micro-batches (objective.py)."""


def predicted_tokens(labels_BL: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of each window that the loss is over, int64 [B]: L - 1 where nothing is ignored."""
    tokens_B: NDArray[np.int64] = (labels_BL[:, 1:] != IGNORED).sum(1)
    return tokens_B
