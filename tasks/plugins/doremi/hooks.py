"""DoReMi in the loop: tokens weigh as their domains do, and domains by their excess over a reference (2305.10429).

In each step, of the whole batch on all ranks:

    excess of d = mean over the tokens of d of max(loss - reference loss, 0)
    w = rules.doremi(w, excess)
    loss = sum over tokens of a_d loss / sum over tokens of a_d,   a_d = w_d / s_d

with s_d the share of d in the batches. The loss is not clipped: the reference is a constant in it. The weights are
those of this very batch: where a rank has several micro-batches, they are scored before the first backward pass.

Shapes: B windows of a forward pass, L tokens of a window, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from tasks.corpus.sampling.loader import IGNORED, Batch
from tasks.moe import checkpoint, gate
from tasks.plugins.proxy_runs import estimating, rules
from tasks.plugins.proxy_runs.estimating import Estimating
from tasks.pretrain import batches
from tasks.pretrain.hook import Hook, Step
from tasks.pretrain.job import TrainingError
from tasks.pretrain.launch.process import Process
from tasks.pretrain.loss import losses, objective
from tasks.settings.fields import Above, Frozen

if TYPE_CHECKING:
    from tasks.pretrain.loop import Trainer

_CHUNK = 256  # positions whose logits exist at once


class Options(Frozen):
    """Job.options["doremi"]: weigh the loss of each token by its domain, and move the weights by the excess."""

    reference: str
    """The folder of a frozen model that has the same vocabulary."""
    step_size: Above = 1.0
    """How far an excess of one nat moves the logarithm of a weight."""


def hooks(trainer: Trainer) -> list[Hook]:
    """The estimator, if the job asks for it; it weighs the objective's cross-entropy."""
    job, shares, model = trainer.job, trainer.sampler.weights, trainer.engine.module
    if "doremi" not in job.options:
        return []
    options = Options(**job.options["doremi"])
    estimating.check(job, "doremi", shares)
    reference = checkpoint.load(Path(options.reference), dtype=trainer.engine.dtype, device=trainer.process.device)
    gate.swap_in(reference, gate.read(Path(options.reference)))
    sizes = [each.config.vocab_size for each in (reference, model)]
    if sizes[0] != sizes[1]:
        raise TrainingError(
            f"doremi compares token by token: the reference {options.reference} has vocab_size = {sizes[0]}, and the "
            f"model {job.model} has {sizes[1]}; give it a reference of the same tokenizer"
        )
    excess = Excess(
        reference,
        shares=shares,
        micro_batch=job.params.micro_batch,
        vocabulary=sizes[1],
        process=trainer.process,
        model=model,
        step_size=options.step_size,
    )
    trainer.objective.factors = excess.factors
    return [excess]


class Excess(Estimating):
    """Weights by the excess over a frozen reference."""

    def __init__(
        self,
        reference: Any,
        *,
        shares: Mapping[str, float],
        micro_batch: int,
        vocabulary: int,
        process: Process,
        model: Any,
        step_size: float = rules.STEP_SIZE,
    ) -> None:
        """Args:
        reference: a causal language model, on the device.
        shares: of each domain in the batches, all positive.
        micro_batch: windows of a forward pass.
        model: the one that is trained.
        vocabulary: its size; a domain that no batch has had yet scores ln of it.
        """
        super().__init__(shares)
        self._reference = reference.eval().requires_grad_(False)
        self._shares, self._micro_batch, self._process = dict(shares), micro_batch, process
        self._model, self._step_size = model, step_size
        self.scores = dict.fromkeys(shares, math.log(vocabulary))
        self._factors: dict[str, float] | None = None

    def before_step(self, step: Step) -> None:
        """Score a batch of several micro-batches, by a forward pass more; one is scored by the pass that trains."""
        self._factors, batch = None, step.batch
        if len(batch.input_ids) > self._micro_batch:
            nats = [
                token_nats(self._model, batch, rows=slice(start, start + self._micro_batch))
                for start in range(0, len(batch.input_ids), self._micro_batch)
            ]
            self._factors = self._score(torch.cat(nats), batch)

    def factors(self, nats_BL: torch.Tensor, batch: Batch, *, rows: slice) -> torch.Tensor:
        """What the nats of each window count, float32 [B]: a_d, scaled to the mean 1 over the predicted tokens.

        Every rank calls it for each of its micro-batches.

        Args:
            nats_BL: losses of the windows `rows` of the batch, 0 where nothing is predicted.
        """
        if self._factors is None:
            self._factors = self._score(nats_BL.detach(), batch)
        return torch.tensor([self._factors[domain] for domain in batch.domains[rows]], device=nats_BL.device)

    def _score(self, nats_BL: torch.Tensor, batch: Batch) -> dict[str, float]:
        """Propose weights from the losses of this rank's whole batch; returns the factor of each domain."""
        reference = [
            token_nats(self._reference, batch, rows=slice(start, start + self._micro_batch))
            for start in range(0, len(batch.input_ids), self._micro_batch)
        ]
        excess_B = (nats_BL.double() - torch.cat(reference).double()).clamp(min=0).sum(1).cpu()
        sums = torch.zeros(3, len(self.domains), dtype=torch.float64)
        predicted = losses.predicted_tokens(batch.labels)
        failed_B = ~torch.cat(reference).isfinite().all(1).cpu()
        for row, domain in enumerate(batch.domains):
            at = self.domains.index(domain)
            sums[:, at] += torch.tensor([float(excess_B[row]), float(predicted[row]), float(failed_B[row])])
        sums = sums.to(self._process.device)
        torch.distributed.all_reduce(sums)
        excess_D, tokens_D, failed_D = sums.cpu().numpy()
        if failed_D.any():
            named = ", ".join(domain for domain, failed in zip(self.domains, failed_D, strict=True) if failed)
            raise TrainingError(f"the reference's loss on {named} is not finite; train it with a lower learning_rate")
        if not np.isfinite(excess_D).all():
            return dict.fromkeys(self.domains, 1.0)  # the loss isn't finite either, and the guard judges it
        scores = self.scores | {
            domain: float(excess_D[i] / tokens_D[i]) for i, domain in enumerate(self.domains) if tokens_D[i]
        }
        weights = rules.doremi(self.weights, excess=scores, step_size=self._step_size)
        self.propose(weights, scores=scores)
        raw = {domain: weight / self._shares[domain] for domain, weight in weights.items()}
        mean = math.fsum(raw[domain] * tokens_D[i] for i, domain in enumerate(self.domains)) / max(tokens_D.sum(), 1)
        return {domain: value / mean for domain, value in raw.items()}


@torch.no_grad()
def token_nats(model: Any, batch: Batch, *, rows: slice) -> torch.Tensor:
    """Losses of the windows `rows` without a gradient, float32 [B, L], 0 where nothing is predicted."""
    ids_BL = torch.from_numpy(batch.input_ids[rows]).to(model.device)
    target_BL = objective.targets(batch.labels[rows]).to(model.device)
    arguments = batches.documents(batch, rows, model.device)
    hidden_BLD = model.base_model(input_ids=ids_BL, use_cache=False, **arguments).last_hidden_state
    head, scaling = model.get_output_embeddings(), getattr(model.config, "logits_scaling", 1.0)
    nats = []
    for hidden, target in zip(hidden_BLD.split(_CHUNK, dim=1), target_BL.split(_CHUNK, dim=1), strict=True):
        logits = (head(hidden).float() / scaling).flatten(0, 1)
        each = F.cross_entropy(logits, target.flatten(), ignore_index=IGNORED, reduction="none")
        nats.append(each.view_as(target))
    return torch.cat(nats, dim=1)
