"""The hook that draws the number of chosen experts of each training step, for a model that serves several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import architectures
from tasks.moe import counts, routing
from tasks.pretrain.hook import Hook, Kind, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.pretrain.loop import Trainer
    from tasks.pretrain.step_result import StepResult


def draw(values: list[int], *, seed: int, step: int) -> int:
    """The value of a step, from 1: each once in as many steps as there are values, in an order drawn anew each time.

    It follows from seed and step alone, so every rank and a resumed run have the same.
    """
    turn, place = divmod(step - 1, len(values))
    return values[int(np.random.default_rng([seed, turn]).permutation(len(values))[place])]


def hooks(trainer: Trainer) -> list[Hook]:
    """The schedule, where the model serves several."""
    model = trainer.engine.module
    return [TopKSchedule(model, seed=trainer.params.seed)] if architectures.elastic(model.config) else []


class TopKSchedule(Hook):
    """Sets top_k of a model's routers for each step, and the usual value for validation."""

    name = "elastic"

    def __init__(self, model: PreTrainedModel, *, seed: int) -> None:
        self.values = architectures.elastic(model.config)
        """Those that the model serves."""
        self._usual: int = counts.experts(model.config)["top_k"]
        self._routers: list[Any] = routing.routers(model)
        self._seed, self._drawn = seed, self._usual

    def before_step(self, step: Step) -> None:
        step.top_k = self._drawn = draw(self.values, seed=self._seed, step=step.number)
        self._set(self._drawn)

    def after_step(self, step: Step, result: StepResult, *, sound: bool) -> None:
        self._set(self._usual)

    def restore(self, state: None) -> None:
        self._set(self._usual)

    def record(self, kind: Kind) -> Mapping[str, Any]:
        return {"top_k": self._drawn} if kind == "step" else {}

    def _set(self, top_k: int) -> None:
        for router in self._routers:
            router.top_k = top_k
