"""Next-token loss per window, which every stage compares: summed nats, no auxiliary loss, fp32 log-softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_CHUNK = 256  # positions whose logits exist at once: 50 MB at a vocabulary of 49152


def window_nll(model: PreTrainedModel, ids_BL: np.ndarray, *, batch: int) -> np.ndarray:
    """Summed negative log-likelihood of each window's tokens 2 to L.

    Args:
        model: put into eval mode for the call.
        ids_BL: int64 [B, L] token ids, L >= 2.

    Returns:
        float64 [B] in nats; divide by L - 1 for nats per token.
    """
    import torch

    if ids_BL.ndim != 2 or ids_BL.shape[1] < 2:
        raise ValueError(f"windows have the shape {ids_BL.shape}; needed: [B, L] with L >= 2")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            sums = [_nll(model, ids_BL[i : i + batch]) for i in range(0, len(ids_BL), batch)]
    finally:
        model.train(training)
    return np.concatenate(sums) if sums else np.zeros(0)


def _nll(model: PreTrainedModel, ids_BL: np.ndarray) -> np.ndarray:
    import torch

    ids = torch.from_numpy(np.ascontiguousarray(ids_BL)).to(model.device)
    hidden_BLD = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    head, scaling = model.get_output_embeddings(), getattr(model.config, "logits_scaling", 1.0)
    return summed(lambda hidden: head(hidden).float() / scaling, hidden_BLD, ids[:, 1:]).cpu().numpy()


def summed(logits: Callable[[Tensor], Tensor], hidden_BLD: Tensor, target_BL: Tensor) -> Tensor:
    """Nats of each window, float64 [B], from hidden states and what gives their logits."""
    import torch
    import torch.nn.functional as F

    total_B = hidden_BLD.new_zeros(len(hidden_BLD), dtype=torch.float64)
    for hidden, target in zip(hidden_BLD.split(_CHUNK, dim=1), target_BL.split(_CHUNK, dim=1), strict=True):
        # Vocabulary last: along any other dimension the softmax takes nine times as long on a CPU.
        nats = F.cross_entropy(logits(hidden).flatten(0, 1), target.flatten(), reduction="none")
        total_B += nats.view_as(target).double().sum(1)
    return total_B


def perplexity(nats_per_token: float) -> float:
    """exp of the mean loss; inf where that overflows."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def bits_per_byte(nats: float, *, num_bytes: int) -> float:
    """Summed nats of some tokens over the UTF-8 bytes that these tokens stand for, in bits."""
    return nats / math.log(2) / num_bytes
