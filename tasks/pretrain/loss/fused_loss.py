"""Liger's fused linear cross-entropy on CUDA: token losses without the logits of all tokens in memory.

The logits of all tokens are the largest tensor of a training step (4 GB in fp32 at 8192 tokens and a vocabulary of
128k); the fused loss computes them a chunk at a time, in forward and again in backward. It replaces the output head's
forward, so the head's hooks run and ZeRO-3 gathers and releases its weight.

Shapes: B windows, L tokens of a window, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def available(device: torch.device) -> bool:
    """Whether the fused loss can run on `device`: CUDA, with the extra `gpu` installed."""
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


@contextlib.contextmanager
def in_place_of_logits(model: Any, target_BL: torch.Tensor, *, ignored: int) -> Iterator[None]:
    """Within it, the `logits` that `model` gives are the nats of each token, fp32 [B, L, 1]; 0 where ignored.

    Args:
        model: a stock causal language model with a head without bias, which sees all L tokens.
        target_BL: the token to be predicted at each position, int64.
        ignored: the target of positions without a loss.

    Raises:
        ValueError: the head has a bias.
    """
    import torch
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    head = model.get_output_embeddings()
    if head.bias is not None:
        raise ValueError(f"{type(model).__name__}: its output head has a bias, which no LLaMA-family model has")
    scale = getattr(model.config, "logits_scaling", 1.0)  # Granite divides its logits by this

    def nats(hidden_BLD: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = liger_fused_linear_cross_entropy(
            (hidden_BLD / scale if scale != 1.0 else hidden_BLD).flatten(0, 1),
            head.weight,
            target_BL.flatten(),
            ignore_index=ignored,
            reduction="none",
            accum_dtype=torch.float32,
        )
        return flat.view(*target_BL.shape, 1) * scale  # the model divides what it takes for logits

    head.forward = nats
    try:
        yield
    finally:
        del head.forward
