"""Which experts the tokens go to, and by which logits, read off the routers while a model runs.

Shapes: T tokens of a forward pass, K experts per token, E routed experts, L sparse layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.moe import counts

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What one router did with T tokens; live tensors, through which gradients reach the router."""

    clean_TE: torch.Tensor
    """The router's logits, without noise and without a selection bias."""
    logits_TE: torch.Tensor
    """The logits by which the experts were chosen."""
    std_TE: torch.Tensor | None
    """Standard deviation of the noise in logits_TE; None where there is none."""
    weights_TK: torch.Tensor
    """By what the chosen experts' outputs are multiplied. They sum to 1 unless the class leaves them as they are."""
    chosen_TK: torch.Tensor
    """The chosen experts, int64."""


Reader = Callable[["nn.Module", Callable[[Routed], None]], list[Any]]
"""Registers the hooks that hand a router's Routed to the function at each forward pass; returns their handles."""

readers: dict[str, Reader] = {}
"""By class name, for routers whose output is not (logits, weights, choice) as that of every stock class."""


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of the sparse layers, in order; none in a dense model.

    Args:
        model: a causal language model that is known here, or the engine around it.

    Raises:
        ValueError: they are not as many as the config's sparse layers.
    """
    from tasks.moe.internals.layers import is_router

    stock: Any = getattr(model, "module", model)  # a DeepSpeed engine has a `config` of its own
    blocks = [block for block in stock.modules() if is_router(block)]
    layers = counts.experts(stock.config)["layers"]
    if len(blocks) != len(layers):
        raise ValueError(f"{type(stock).__name__} has {len(blocks)} routers in {len(layers)} sparse layers")
    return blocks


@contextmanager
def record(model: nn.Module) -> Iterator[list[Routed]]:
    """Yield a list that gets a Routed for each sparse layer, in order, of the forward pass inside the block.

    A layer that gradient checkpointing (use_reentrant=False) runs again in the backward pass is not recorded again,
    be the backward pass inside the block or after it.
    """
    seen: list[Routed] = []
    handles = [handle for router in routers(model) for handle in _watch(router, seen.append)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def expert_load(model: nn.Module) -> Iterator[np.ndarray]:
    """Yield an int64 [sparse layers, experts] array that counts, while the block runs, the tokens sent to each expert.

    A row grows by tokens x top_k per forward pass; layers that run again in a backward pass do not count again. Of a
    dense model the array is empty.
    """
    import torch

    blocks = routers(model)
    sizes = counts.experts(getattr(model, "module", model).config)
    load_LE = np.zeros((len(blocks), sizes["experts"]), dtype=np.int64)

    def count(layer: int) -> Callable[[Routed], None]:
        def add(routed: Routed) -> None:
            chosen = torch.bincount(routed.chosen_TK.reshape(-1), minlength=load_LE.shape[1])
            load_LE[layer] += chosen.cpu().numpy()

        return add

    handles = [handle for layer, block in enumerate(blocks) for handle in _watch(block, count(layer))]
    try:
        yield load_LE
    finally:
        for handle in handles:
            handle.remove()


def _watch(router: nn.Module, give: Callable[[Routed], None]) -> list[Any]:
    import torch

    def outside_backward(routed: Routed) -> None:
        if torch._C._current_graph_task_id() == -1:  # as torch.utils.checkpoint recognises a recomputation
            give(routed)

    return readers.get(type(router).__name__, _read)(router, outside_backward)


def _read(router: nn.Module, give: Callable[[Routed], None]) -> list[Any]:
    """The reader of the stock classes and of what TrainingRouter makes of them."""
    from tasks.moe.internals.training_router import TrainingRouter

    parts: list[tuple[Any, ...]] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits_TE, weights_TK, chosen_TK = output
        clean_TE, logits_TE, std_TE = parts.pop() if parts else (logits_TE, logits_TE, None)
        give(Routed(clean_TE=clean_TE, logits_TE=logits_TE, std_TE=std_TE, weights_TK=weights_TK, chosen_TK=chosen_TK))

    handles: list[Any] = [router.register_forward_hook(hook)]
    if isinstance(router, TrainingRouter):
        handles.append(router.observe(lambda *seen: parts.append(seen)))
    return handles
