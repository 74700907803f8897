"""The seam around a training step: what a feature does there that is not the step itself.

A run has the hooks of the plug-ins whose `hooks.py` has `hooks(trainer) -> list[Hook]`, then the core's. Every rank
has the same hooks and calls them in the same order, so a hook may use collectives. A `hooks.py` may also have
`prepare(model, job)`, which changes the model before the engine has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from tasks.corpus.sampling.loader import Batch
    from tasks.pretrain.loss.losses import Losses
    from tasks.pretrain.step_result import StepResult

Kind = Literal["step", "validation", "run"]


@dataclass(kw_only=True)
class Step:
    """A training step before its forward passes."""

    number: int
    """From 1."""
    batch: Batch
    """This rank's part."""
    rate: float
    """The highest learning rate of the model's parts."""
    top_k: int
    """Experts of a token; a hook that sets others in the routers says so here."""


class Hook:
    """A feature's part in a run. Every method does nothing here."""

    name = ""
    """Under which a checkpoint has the hook's state."""

    def before_step(self, step: Step) -> None:
        """Before the forward passes of a step."""

    def backward(self, step: Step) -> list[Losses] | None:
        """Leave a step's gradient in the engine, and return its losses; None leaves that to the trainer."""

    def after_step(self, step: Step, result: StepResult, *, sound: bool) -> None:
        """After a step that was taken, or left out if not `sound`; not after one that a rollback undid."""

    def validates(self, step: int) -> bool:
        """Whether the hook needs a validation after this step, whatever `eval_tokens` says."""
        return False

    def after_validation(self, step: int, losses: Mapping[str, float]) -> dict[str, float] | None:
        """New domain weights from the losses by domain, nats per token, after this step; None keeps the old."""

    def record(self, kind: Kind) -> Mapping[str, Any]:
        """Entries for the log's record of a step or a validation, or for pretrain.json at the end of the run."""
        return {}

    def state(self) -> Any:
        """All that `restore` needs, as JSON values."""

    def restore(self, state: Any) -> None:
        """Go on from what `state` returned."""

    def export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Take out of the trained weights what no stock class holds, and write it beside the checkpoint."""
