"""Runs a checkpoint layer by layer, and gives each sparse layer with what it read and chose.

The first stage of the protocol of arXiv 2406.18219, section 4.1, runs the model as it is used and keeps the input of
every layer; the second feeds it to all experts. Here both are done while a layer is in memory, so that neither the
model nor the inputs of more than one layer are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tasks import architectures
from tasks.moe.internals import layers as internals
from tasks.moe.streamed import Streamed
from tasks.plugins.analysis.layer import Layer, Parent, Seen
from tasks.plugins.analysis.text import Text

_BATCH = 4  # windows


class Stream:
    """A sparse checkpoint on its way through its layers. Without a text, only the layers asked for are read."""

    def __init__(self, model: Streamed, *, text: Text | None, parent: Parent | None = None) -> None:
        self.model = model
        self.text = text
        self.parent = parent
        self.sparse = architectures.sparse_layers(model.config)
        self.hidden_BLD: Tensor | None = None
        """What the next layer reads; None without a text."""
        self.chosen_TK: Tensor | None = None
        """What the last sparse layer chose."""
        if text is not None:
            self.hidden_BLD = model.embed(torch.from_numpy(text.ids_BL))

    @torch.no_grad()
    def layer(self, i: int, *, wanted: bool) -> Layer | None:
        """Run layer `i`, to be called in order; the layer itself if it is wanted and sparse.

        The layer's weights are in memory as long as the caller holds it.
        """
        wanted = wanted and i in self.sparse
        if self.text is None and not wanted:
            return None
        block = self.model.block(i)
        if i + 1 < self.model.layers and self.text is not None:
            self.model.prefetch(i + 1)
        ffn = internals.sparse_ffn(block) if i in self.sparse else None
        seen = None if self.text is None else self._run(block, i, router=ffn and ffn.router)
        if ffn is None or not wanted:
            return None
        activation: Any = ACT2FN[self.model.config.hidden_act]
        return Layer(number=i, ffn=ffn, activation=activation, parent=self.parent, seen=seen)

    def _run(self, block: nn.Module, i: int, *, router: Any) -> Seen | None:
        """Let the windows pass a layer, and record what its router, if it has one, read and chose."""
        assert self.hidden_BLD is not None
        assert self.text is not None
        records: list[tuple[Tensor, Tensor, Tensor]] = []

        def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            logits_TE, _, chosen_TK = output
            records.append((inputs[0].reshape(-1, inputs[0].shape[-1]).clone(), logits_TE.float(), chosen_TK))

        if router is not None:
            router.register_forward_hook(record)
        where = self.model.attention(i, self.hidden_BLD.shape[1])
        for part in self.hidden_BLD.split(_BATCH):
            part.copy_(block(part, **where))
        if router is None:
            return None
        inputs_TD, logits_TE, chosen_TK = (torch.cat(parts) for parts in zip(*records, strict=True))
        below_TK, self.chosen_TK = self.chosen_TK, chosen_TK
        return Seen(text=self.text, inputs_TD=inputs_TD, logits_TE=logits_TE, chosen_TK=chosen_TK, below_TK=below_TK)

    def state(self) -> dict[str, Tensor]:
        """What the next layer needs; {} without a text."""
        kept = {"hidden_BLD": self.hidden_BLD, "chosen_TK": self.chosen_TK}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self.hidden_BLD = state["hidden_BLD"].to(self.model.device)
        if "chosen_TK" in state:
            self.chosen_TK = state["chosen_TK"].to(self.model.device)
