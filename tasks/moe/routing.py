"""Which experts the tokens go to, read off the routers while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.moe import counts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The routers of the sparse layers, in order; each has `weight` [E, D], and returns its choice as third output.

    Raises ValueError if they are not as many as the config's sparse layers, or if there are none.
    """
    found = [block for block in model.modules() if type(block).__name__.endswith("TopKRouter")]
    layers = counts.experts(model.config)["layers"]
    if not found or len(found) != len(layers):
        raise ValueError(f"{type(model).__name__} has {len(found)} routers in {len(layers)} sparse layers")
    return found


@contextmanager
def expert_load(model: PreTrainedModel) -> Iterator[np.ndarray]:
    """Yield an int64 [sparse layers, experts] array that counts, while the block runs, the tokens sent to each expert.

    A row grows by tokens x top_k per forward pass. Under gradient checkpointing layers run twice and count twice.
    """
    import torch

    blocks = routers(model)
    load_LE = np.zeros((len(blocks), counts.experts(model.config)["experts"]), dtype=np.int64)

    def count(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            chosen = torch.bincount(output[2].reshape(-1), minlength=load_LE.shape[1])
            load_LE[layer] += chosen.cpu().numpy()

        return hook

    handles = [block.register_forward_hook(count(layer)) for layer, block in enumerate(blocks)]
    try:
        yield load_LE
    finally:
        for handle in handles:
            handle.remove()
