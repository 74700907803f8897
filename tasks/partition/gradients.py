"""Importance of every neuron, by text cluster: |h dL/dh| summed over tokens (LLaMA-MoE, arXiv 2406.16554, 3.1).

First-order Taylor expansion of the loss in a neuron set to zero. Where the original clusters documents with a sentence
encoder, this takes the dense model's own final hidden states. One layer of the model is in memory at a time: the
forward pass leaves every layer's input on disk, and each layer is then run again, top-down, to pass the gradient on.

Shapes: B windows, L their length, D hidden, N neurons, C text clusters, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.moe.streamed import Streamed
from tasks.partition import assignment

SEGMENT = 64
"""Tokens of a text segment, the unit that is clustered."""
_TOKENS = 2048
"""Tokens that pass a layer at once; about ten float32 [tokens, N] arrays are in memory."""
_POSITIONS = 256
"""Positions of a window whose logits exist at once."""


def importance(
    parent: Streamed,
    ids_BL: np.ndarray,
    *,
    layers: list[int],
    clusters: int,
    seed: int,
    scratch: Path,
    report: Callable[[str], None],
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Sum over the tokens of each text cluster of |h dL/dh|, L being the mean cross-entropy over all windows.

    Args:
        layers: whose neurons are wanted.
        scratch: a folder for layers x B x L x D float32 numbers, from the lowest of `layers` up; left empty.
        report: called with what is done.

    Returns:
        float32 [C, N] of each of `layers`, and the cluster of each segment of SEGMENT tokens, int64 [B, ceil(L / 64)].

    Raises:
        ValueError: windows of one token, or fewer segments than clusters.
    """
    windows, length = ids_BL.shape
    if length < 2:
        raise ValueError(f"windows have the shape {ids_BL.shape}; a loss needs at least two tokens in each")
    segments = windows * -(-length // SEGMENT)
    if segments < clusters:
        raise ValueError(
            f"partition.calibration_windows = {windows}: windows of {length} tokens give {segments} segments of "
            f"{SEGMENT} tokens, fewer than the {clusters} text clusters, one per expert; set more windows"
        )
    ids = torch.from_numpy(ids_BL.astype(np.int64)).to(parent.device)
    lowest, batch = min(layers), max(1, _TOKENS // length)
    hidden_BLD = _forward(parent, ids, lowest=lowest, batch=batch, scratch=scratch)
    report("forward pass done")
    cluster_BS = _clusters(parent, hidden_BLD, clusters=clusters, seed=seed)
    cluster_BL = torch.from_numpy(cluster_BS.repeat(SEGMENT, axis=1)[:, :length]).to(parent.device)
    gradient_BLD = _loss_gradient(parent, hidden_BLD, ids)
    importance_CN = {}
    for i in reversed(range(lowest, parent.layers)):
        path = _path(scratch, i)
        inputs_BLD = np.memmap(path, np.float32, "r", shape=tuple(gradient_BLD.shape))
        score_CN = _layer(parent, i, inputs_BLD, gradient_BLD, cluster_BL=cluster_BL, clusters=clusters, batch=batch)
        del inputs_BLD
        path.unlink()
        if i in layers:
            importance_CN[i] = score_CN.float().cpu().numpy()
        report(f"gradients of layer {i}")
    return {i: importance_CN[i] for i in layers}, cluster_BS


def _path(scratch: Path, i: int) -> Path:
    return scratch / f"layer-{i}-inputs.f32"


@torch.no_grad()
def _forward(parent: Streamed, ids_BL: Tensor, *, lowest: int, batch: int, scratch: Path) -> Tensor:
    """Hidden states before the final norm, [B, L, D]; what the layers from `lowest` up read is left in `scratch`."""
    hidden_BLD = parent.embed(ids_BL)
    for i in range(parent.layers):
        if i >= lowest:
            hidden_BLD.cpu().numpy().tofile(_path(scratch, i))
        block, where = parent.block(i), parent.attention(i, ids_BL.shape[1])
        for part in hidden_BLD.split(batch):
            part.copy_(block(part, **where))
    return hidden_BLD


def _clusters(parent: Streamed, hidden_BLD: Tensor, *, clusters: int, seed: int) -> np.ndarray:
    """Balanced spherical k-means on the mean final hidden state of each segment: int64 [B, segments of a window].

    The mean over all segments is taken off first: final states share one large direction, which tells no text apart.
    """
    norm = parent.norm()
    means = [norm(part).mean(1) for part in hidden_BLD.split(SEGMENT, dim=1)]
    rows_PD = torch.stack(means, dim=1).flatten(0, 1).cpu().numpy()
    count, more = divmod(len(rows_PD), clusters)
    cluster_P = assignment.kmeans(
        rows_PD - rows_PD.mean(0),
        sizes_G=np.full(clusters, count) + (np.arange(clusters) < more),
        generator=np.random.default_rng(seed),
        cosine=True,
    )
    return cluster_P.reshape(len(hidden_BLD), -1)


def _loss_gradient(parent: Streamed, hidden_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy in the hidden states before the final norm, written over them."""
    head = parent.head()
    predicted = ids_BL[:, 1:].numel()
    for hidden_LD, target_L in zip(hidden_BLD[:, :-1], ids_BL[:, 1:], strict=True):
        for hidden, target in zip(hidden_LD.split(_POSITIONS), target_L.split(_POSITIONS), strict=True):
            leaf = hidden.clone().requires_grad_()
            loss = F.cross_entropy(head(leaf), target, reduction="sum") / predicted
            hidden.copy_(torch.autograd.grad(loss, leaf)[0])
    hidden_BLD[:, -1] = 0  # nothing is predicted from the last token
    return hidden_BLD


def _layer(
    parent: Streamed,
    i: int,
    inputs_BLD: np.ndarray,
    gradient_BLD: Tensor,
    *,
    cluster_BL: Tensor,
    clusters: int,
    batch: int,
) -> Tensor:
    """Run layer `i` again: its neurons' scores, float64 [C, N]; the gradient becomes that of the layer's input."""
    block = parent.block(i).requires_grad_(False)
    where = parent.attention(i, inputs_BLD.shape[1])
    taps: list[Tensor] = []
    down: Any = block.get_submodule("mlp.down_proj")
    down.register_forward_pre_hook(lambda _module, arguments: taps.append(arguments[0]))
    score_CN = torch.zeros(clusters, down.in_features, dtype=torch.float64, device=parent.device)
    for start in range(0, len(inputs_BLD), batch):
        part = slice(start, start + batch)
        leaf = torch.from_numpy(inputs_BLD[part].copy()).to(parent.device).requires_grad_()
        output = block(leaf, **where)
        h_BLN = taps.pop()
        below, h_gradient = torch.autograd.grad(output, [leaf, h_BLN], gradient_BLD[part])
        gradient_BLD[part] = below
        effect_TN = (h_BLN.detach() * h_gradient).abs_().flatten(0, 1)
        score_CN.index_add_(0, cluster_BL[part].flatten(), effect_TN.double())
    return score_CN
