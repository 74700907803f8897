"""Calibration tokens, and the hidden states that the layers below hand up, converted layers included.

Shapes: B windows, L tokens each, T = B x L, D hidden, N neurons of the dense FFN.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaMLP

_BATCH = 4  # windows per attention call


def draw(corpus_dir: Path, *, seq_len: int, count: int, seed: int) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Training windows, the same number from every domain: int64 [count, seq_len], and which they are.

    Raises:
        ValueError: a domain has no whole training window.
    """
    from tasks.corpus import manifest
    from tasks.corpus.sampler import Sampler
    from tasks.corpus.windows import Windows

    corpus = manifest.load(corpus_dir)
    windows = {name: Windows(corpus_dir, name, "train", seq_len=seq_len) for name in corpus.domains}
    sampler = Sampler(
        {name: len(split) for name, split in windows.items()},
        weights=dict.fromkeys(windows, 1.0),
        seed=seed,
        batch=count,
        corpus_sha256=corpus.sha256,
    )
    slots = sampler.next()
    return np.stack([windows[domain][i] for domain, i in slots]), slots


class States:
    """The hidden states of all calibration windows, moved up through the model one layer at a time."""

    def __init__(self, model: LlamaForCausalLM, ids_BL: np.ndarray) -> None:
        if model.config._attn_implementation != "sdpa":
            raise ValueError(f"attention is {model.config._attn_implementation}; calibration needs sdpa for causality")
        self._model = model
        ids = torch.from_numpy(ids_BL).to(model.device)
        self._hidden_BLD = model.model.embed_tokens(ids).float()
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self._rotary = model.model.rotary_emb(self._hidden_BLD, positions)

    def attend(self, layer: int) -> torch.Tensor:
        """Pass the attention of `layer`; return what its FFN reads, [T, D]."""
        block = self._model.model.layers[layer]
        for i in range(0, len(self._hidden_BLD), _BATCH):
            hidden = self._hidden_BLD[i : i + _BATCH]
            attended, _ = block.self_attn(
                hidden_states=block.input_layernorm(hidden), position_embeddings=self._rotary, attention_mask=None
            )
            self._hidden_BLD[i : i + _BATCH] = hidden + attended
        normed: torch.Tensor = block.post_attention_layernorm(self._hidden_BLD)
        return normed.flatten(0, 1)

    def add(self, output_TD: torch.Tensor) -> None:
        """Add the output of the layer's FFN, dense or converted."""
        self._hidden_BLD += output_TD.view_as(self._hidden_BLD)


def neurons(block: LlamaMLP, x_TD: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of a dense FFN, [T, N]."""
    gate, up = block.gate_proj.weight, block.up_proj.weight
    return F.silu(x_TD @ gate.T).mul_(x_TD @ up.T)
