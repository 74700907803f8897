"""Distillation losses: the distance of the student's distributions and hidden states from the dense parent's.

Shapes: B windows of one forward pass, L tokens of a window, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from tasks.corpus.sampling.loader import IGNORED, Batch
from tasks.pretrain.job import Job
from tasks.pretrain.loss import teacher
from tasks.settings.pretrain import Distill

if TYPE_CHECKING:
    import torch

    from tasks.pretrain.loss.teacher_cache import TeacherCache


class Distiller:
    """The distillation losses of one run."""

    def __init__(self, settings: Distill, parent: teacher.Teacher | TeacherCache) -> None:
        self._settings, self._parent = settings, parent

    @classmethod
    def load(cls, job: Job, *, device: torch.device, dtype: torch.dtype) -> Self | None:
        """Load the parent, or with `top_n` its cache, which is completed first. None without `distill`.

        All ranks must call it together.

        Args:
            dtype: the training dtype, in which the parent computes too.

        Raises:
            TrainingError: the parent's vocabulary, hidden size or number of layers isn't the student's; the disk is
                full.
        """
        from tasks.pretrain.loss.teacher_cache import TeacherCache

        settings = job.params.distill
        if settings is None:
            return None
        teacher.check(job)
        kind = teacher.Teacher.load if settings.top_n is None else TeacherCache
        return cls(settings, kind(job, device=device, dtype=dtype))

    @property
    def needs_hidden(self) -> bool:
        """Whether the student must be called with output_hidden_states=True."""
        return self._settings.hidden > 0

    def losses(self, batch: Batch, *, rows: slice, out: Any, target_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of the windows `rows` of a batch by name, fp32 [B], without the coefficients of the settings.

        Each is the sum over the window's predicted tokens, so it does not depend on how windows are grouped.

        Args:
            out: the student's output: `logits` [B, L, V] and, if `needs_hidden`, `hidden_states`.
            target_BL: the token to be predicted at each position, IGNORED where there is none.

        Returns:
            With a coefficient `logits` above 0, from one pass over the logits:
            "cross_entropy", in nats, and
            "kl": temperature ** 2 * KL(parent | student) in nats at that temperature (arXiv 1503.02531);
            with `top_n`, of the kept tokens and all others as one.
            They must be weighted by the coefficients of the settings before backward (`divergence.losses`).

            With a coefficient `hidden` above 0,
            "hidden": |h - h_parent|^2 / |h_parent|^2, the mean over the layers asked for: of the state before the
            head, or of that and those after every decoder layer but the last. Relative, because a few tokens have
            huge activations.
        """
        from tasks.pretrain.loss import divergence

        settings, source = self._settings, self._parent
        losses = {}
        if isinstance(source, teacher.Teacher):
            states = source.states(batch, rows=rows, every_layer=self.needs_hidden and settings.layers == "all")
            parent: divergence.Parent = divergence.Resident(
                states[-1].flatten(0, 1), source.logits, temperature=settings.temperature
            )
        else:
            states = ()
            parent = source.kept(batch, rows=rows)
        if settings.logits:
            losses["cross_entropy"], losses["kl"] = divergence.losses(
                out.logits,
                target_BL,
                parent,
                cross_entropy=settings.cross_entropy,
                kl=settings.logits,
                temperature=settings.temperature,
            )
        if self.needs_hidden:
            own = teacher.layers(out.hidden_states)[-len(states) :]
            losses["hidden"] = _relative(own, states, target_BL != IGNORED)
        return losses


def _relative(
    own: tuple[torch.Tensor, ...], parents: tuple[torch.Tensor, ...], counted_BL: torch.Tensor
) -> torch.Tensor:
    """Squared error relative to the parent's squared norm, mean over layers, sum over counted tokens, fp32 [B]."""
    import torch

    total_B = torch.zeros(len(counted_BL), dtype=torch.float32, device=counted_BL.device)
    for h_BLD, parent_BLD in zip(own, parents, strict=True):
        p_BLD = parent_BLD.float()
        error_BL = (h_BLD.float() - p_BLD).square().sum(2) / p_BLD.square().sum(2)
        total_B = total_B + error_BL.masked_fill(~counted_BL, 0.0).sum(1)
    return total_B / len(parents)
