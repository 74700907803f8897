"""The loss of a forward pass over packed windows.

Shapes: B windows of one forward pass, L tokens of a window, V vocabulary.

With masked documents a window is several sequences. Stock attention is told in the two ways it knows: position ids
that start again at each document, from which transformers builds the masks of eager, SDPA and flex attention
(`masking_utils.find_packed_sequence_indices`; only without an attention mask and a cache), and cumulative lengths,
with which flash attention takes its variable-length path at any B (`modeling_flash_attention_utils`; from position
ids it does so at B = 1 alone, and else attends across documents).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.loader import IGNORED, Batch
from tasks.pretrain import fused_loss

if TYPE_CHECKING:
    import torch
    from torch import nn


def predicted(labels_BL: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of each window that the loss is over, int64 [B]: L - 1 where nothing is ignored."""
    return (labels_BL[:, 1:] != IGNORED).sum(1)


def losses(
    model: nn.Module, batch: Batch, *, rows: slice, device: torch.device, balance: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the windows `rows` of a batch.

    Args:
        model: a stock sparse causal language model, or the engine around it.
        rows: start and stop of the windows of this pass.
        balance: whether the load-balancing loss is wanted.

    Returns:
        Loss of each window, fp32 [B] in nats per predicted token (0 where none is), and transformers' load-balancing
        loss over the tokens up to each window's last predicted one, so without padding; 0 if not wanted.
    """
    import torch
    import torch.nn.functional as F

    ids = torch.from_numpy(batch.input_ids[rows]).to(device)
    labels_BL = batch.labels[rows]
    target_BL = torch.from_numpy(labels_BL).to(device)
    target_BL = F.pad(target_BL[:, 1:], (0, 1), value=IGNORED)  # all L rows: slicing the logits would copy them
    stock = getattr(model, "module", model)
    fused = fused_loss.available(device)
    with fused_loss.in_place_of_logits(stock, target_BL, ignored=IGNORED) if fused else contextlib.nullcontext():
        out = model(input_ids=ids, output_router_logits=balance, use_cache=False, **_documents(batch, rows, device))
    if fused:
        nats = out.logits
    else:
        nats = F.cross_entropy(
            out.logits.float().flatten(0, 1), target_BL.flatten(), ignore_index=IGNORED, reduction="none"
        )
    loss_B = nats.view_as(ids).sum(1) / (target_BL != IGNORED).sum(1).clamp(min=1)
    if not balance:
        return loss_B, loss_B.new_zeros(())
    real_BL = np.logical_or.accumulate(labels_BL[:, ::-1] != IGNORED, axis=1)[:, ::-1].copy()
    real_BL[:, 0] = True  # a window begins with text, also where nothing in it is predicted
    if real_BL.all():
        return loss_B, out.aux_loss
    return loss_B, _balance(model, out.router_logits, torch.from_numpy(real_BL).to(device))


def _documents(batch: Batch, rows: slice, device: torch.device) -> dict[str, Any]:
    """The model's arguments that keep documents apart; none where they aren't."""
    import torch

    if batch.position_ids is None:
        return {}
    length = batch.input_ids.shape[1]
    first, last = np.searchsorted(batch.cu_seqlens, [rows.start * length, rows.stop * length])
    ends = batch.cu_seqlens[first : last + 1] - rows.start * length
    lengths = torch.from_numpy(ends).to(device)
    longest = int(np.diff(ends).max())
    return {
        "position_ids": torch.from_numpy(batch.position_ids[rows]).to(device),
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _balance(model: Any, router_logits: Any, real_BL: torch.Tensor) -> torch.Tensor:
    """The load-balancing loss that every sparse family of transformers has, over the tokens that are no padding."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    stock = getattr(model, "module", model)  # DeepSpeed's engine has num_experts of its own
    return torch.as_tensor(
        load_balancing_loss_func(router_logits, stock.num_experts, stock.num_experts_per_tok, real_BL)
    )
