"""The hook that trains masks with a dense model: Job.options["masks"] = {"shape": {config field: size}}."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.plugins.masks import module
from tasks.pretrain.checkpoints import random_state
from tasks.pretrain.hook import Hook, Step

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from tasks.pretrain.job import Job
    from tasks.pretrain.loop import Trainer


def prepare(model: PreTrainedModel, job: Job) -> None:
    """Give the model masks, which all ranks begin with the same logits of, if the job has a shape for them."""
    if options := job.options.get("masks"):
        random_state.reseed(job.params.seed, step=0, rank=0)
        module.install(model, options["shape"], ramp=module.ramp(job.params.steps))


def hooks(trainer: Trainer) -> list[Hook]:
    """The hook, where the model has masks."""
    masks = module.of(trainer.engine.module)
    if masks is None:
        return []
    trainer.objective.terms["lagrangian"] = lambda: masks.lagrangian
    return [MasksHook(masks)]


class MasksHook(Hook):
    """Moves the targets of the masks before each step, and writes their logits beside the trained model."""

    name = "masks"

    def __init__(self, masks: module.Masks) -> None:
        self._masks = masks

    def before_step(self, step: Step) -> None:
        self._masks.begin(step.number)

    def export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        module.write(folder, module.take_out(weights))
