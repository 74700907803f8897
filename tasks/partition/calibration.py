"""Calibration tokens, and the hidden states that the layers below hand up, converted layers included.

Shapes: B windows, L tokens each, T = B x L, D hidden, N neurons of the dense FFN.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks import architectures
from tasks.moe import device
from tasks.moe.streamed import Streamed

_BATCH = 4  # windows per attention call


def draw(corpus_dir: Path, *, seq_len: int, count: int, seed: int) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Training windows, the same number from every domain: int64 [count, seq_len], and which they are.

    Raises:
        ValueError: a domain has no whole training window.
    """
    from tasks.corpus import manifest
    from tasks.corpus.sampling.sampler import Sampler
    from tasks.corpus.sampling.windows import Windows

    corpus = manifest.load(corpus_dir)
    windows = {name: Windows(corpus_dir, name, "train", seq_len=seq_len) for name in corpus.trained}
    sampler = Sampler(
        {name: len(split) for name, split in windows.items()},
        weights=dict.fromkeys(windows, 1.0),
        seed=seed,
        batch=count,
        corpus_sha256=corpus.sha256,
    )
    slots = sampler.next()
    return np.stack([windows[domain][i] for domain, i in slots]), slots


def deal(slots: Sequence[tuple[str, int]], values: Sequence[int]) -> np.ndarray:
    """A value of `elastic` for each calibration window, int64 [B]: in turn within a domain, so that each value sees
    all domains; the domains begin with different ones."""
    turns: dict[str, int] = {}
    dealt = []
    for domain, _ in slots:
        turns[domain] = turns.get(domain, len(turns) - 1) + 1
        dealt.append(values[turns[domain] % len(values)])
    return np.array(dealt, dtype=np.int64)


class States:
    """The hidden states of all calibration windows, moved up through a dense model one layer at a time."""

    def __init__(self, model: Streamed, ids_BL: np.ndarray) -> None:
        self._model = model
        self._multiplier = architectures.multipliers(model.config)["residual_multiplier"]
        self.hidden_BLD = model.embed(torch.from_numpy(ids_BL)) / self._multiplier
        """float32, over the model's residual multiplier, so that outputs are added as they are; all that is kept of
        the text."""
        self.dtype = torch.bfloat16 if device.has_bfloat16(model.device.type) else torch.float32
        """Of the products of attention and FFN. What is lost by bfloat16 is small beside what the experts lose."""

    def products(self) -> torch.autocast:
        """A context in which modules multiply in `dtype`."""
        return torch.autocast(self._model.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def attend(self, block: Any, layer: int) -> torch.Tensor:
        """Pass the attention of `layer`, whose block is given; return what its FFN reads, [T, D]."""
        where = self._model.attention(layer, self.hidden_BLD.shape[1])
        read_BLD = torch.empty_like(self.hidden_BLD)
        for part, read in zip(self.hidden_BLD.split(_BATCH), read_BLD.split(_BATCH), strict=True):
            with self.products():
                attended, _ = block.self_attn(hidden_states=block.input_layernorm(self._whole(part)), **where)
            part += attended
            read.copy_(block.post_attention_layernorm(self._whole(part)))
        return read_BLD.flatten(0, 1)

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        return part if self._multiplier == 1 else part * self._multiplier

    @property
    def residual_TD(self) -> torch.Tensor:
        """What the output of the FFN will be added to, and then is: a view."""
        return self.hidden_BLD.flatten(0, 1)
