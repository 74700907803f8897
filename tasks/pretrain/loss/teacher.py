"""The dense parent as a teacher, in the memory of every process.

Shapes: B windows of one forward pass, L tokens of a window, V vocabulary, D hidden, N decoder layers.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

from tasks.corpus.sampling.loader import Batch
from tasks.pretrain.job import Job, TrainingError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SHARED = {"vocab_size": "vocabulary", "hidden_size": "hidden size", "num_hidden_layers": "number of decoder layers"}


class Teacher:
    """The dense model that the student was split from, in eval mode, without gradients."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model.eval().requires_grad_(False)

    @classmethod
    def load(cls, job: Job, *, device: torch.device, dtype: torch.dtype) -> Self:
        """Read the parent of a run."""
        from tasks.moe import checkpoint

        return cls(checkpoint.load(job.parent, dtype=dtype, device=device))

    def states(self, batch: Batch, *, rows: slice, every_layer: bool = False) -> tuple[torch.Tensor, ...]:
        """States [B, L, D] of the windows `rows` of a batch.

        The last is after the final norm, before the head; with `every_layer` there are N: before it those after each
        decoder layer but the last. Documents are kept apart as the student keeps them.
        """
        import torch

        from tasks.pretrain import batches

        device = self._model.device
        ids = torch.from_numpy(batch.input_ids[rows]).to(device)
        with torch.no_grad():
            out = self._model.base_model(
                input_ids=ids,
                use_cache=False,
                output_hidden_states=every_layer,
                **batches.documents(batch, rows, device),
            )
        return layers(out.hidden_states) if every_layer else (out.last_hidden_state,)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of states [..., D] before the head."""
        import torch

        with torch.no_grad():
            logits: torch.Tensor = self._model.get_output_embeddings()(hidden)
            scaling = getattr(self._model.config, "logits_scaling", 1.0)  # Granite divides its logits by this
            return logits if scaling == 1 else logits / scaling


def layers(hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """transformers' hidden states but the embeddings: after each decoder layer, the last after the final norm too."""
    return hidden_states[1:]


def check(job: Job) -> None:
    """Raise TrainingError unless parent and student have the same vocabulary, hidden size and number of layers."""
    parent, student = (json.loads((folder / "config.json").read_text()) for folder in (job.parent, job.model))
    for field, name in _SHARED.items():
        if parent[field] != student[field]:
            raise TrainingError(
                f"pretrain.distill needs a parent and a split model with the same {name}: {job.parent} has {field} = "
                f"{parent[field]}, {job.model} has {student[field]}. Run the stage `partition` again, or leave "
                "`distill` out"
            )
