"""The number of chosen experts in each training step of a model that serves several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import architectures
from tasks.moe import counts, routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def draw(values: list[int], *, seed: int, step: int) -> int:
    """The value of a step, from 1: each once in as many steps as there are values, in an order drawn anew each time.

    It follows from seed and step alone, so every rank and a resumed run have the same.
    """
    turn, place = divmod(step - 1, len(values))
    return values[int(np.random.default_rng([seed, turn]).permutation(len(values))[place])]


class Dial:
    """Sets top_k of a model's routers. A model that serves one top_k alone is left as it is."""

    def __init__(self, model: PreTrainedModel, *, seed: int) -> None:
        self.values = architectures.elastic(model.config)
        """Those that the model serves; empty if it serves one."""
        self._usual: int = counts.experts(model.config)["top_k"]
        self._routers: list[Any] = routing.routers(model) if self.values else []
        self._seed = seed

    def turn(self, step: int) -> int:
        """Set and return the value of a training step."""
        return self._set(draw(self.values, seed=self._seed, step=step) if self.values else self._usual)

    def reset(self) -> None:
        """Set the usual value, which validation has."""
        self._set(self._usual)

    def _set(self, top_k: int) -> int:
        for router in self._routers:
            router.top_k = top_k
        return top_k
