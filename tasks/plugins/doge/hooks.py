"""DoGE in the loop: a domain weighs as much as its gradient helps the others, or a target (arXiv 2310.15393).

A step takes the gradient of each domain's mean loss apart, in a backward pass over its own windows. All passes
together cost what one over the batch costs. The gradients, one of the model's size a domain, are kept until the
weights have moved. The model is then trained by their sum with these weights.

Shapes: D domains, P parameters of a tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.corpus.sampling.loader import Batch
from tasks.plugins.proxy_runs import estimating, rules
from tasks.plugins.proxy_runs.estimating import Estimating
from tasks.pretrain import batches
from tasks.pretrain.hook import Hook, Step
from tasks.pretrain.job import Job, TrainingError
from tasks.pretrain.launch.process import Process
from tasks.pretrain.loss.losses import Losses, predicted_tokens
from tasks.pretrain.loss.objective import Objective
from tasks.settings import Pretrain
from tasks.settings.fields import Above, Frozen, Name

if TYPE_CHECKING:
    from tasks.pretrain.engine.interface import Engine
    from tasks.pretrain.loop import Trainer

Gradient = list[torch.Tensor]


class Options(Frozen):
    """Job.options["doge"]: move the weights by products of the domains' gradients, and train by their weighted sum."""

    target: dict[Name, Above] | None = None
    """Domains whose loss is to fall, on held-out windows; absent: every domain's, each helped by the others."""


def hooks(trainer: Trainer) -> list[Hook]:
    """The estimator, if the job asks for it."""
    job, shares = trainer.job, trainer.sampler.weights
    if "doge" not in job.options:
        return []
    target = Options(**job.options["doge"]).target
    _check(job, shares)
    each = job.params.batch // len(shares)
    return [
        Alignment(
            job.params,
            trainer.engine,
            domains=list(shares),
            target=estimating.normalised(target) if target else None,
            windows=estimating.held_out(
                job, target or {}, count=each * job.params.steps
            ),  # fewer if there are no more
            objective=trainer.objective,
            process=trainer.process,
        )
    ]


def _check(job: Job, shares: Mapping[str, float]) -> None:
    estimating.check(job, "doge", shares)
    params = job.params
    if params.zero_stage == 3 or params.expert_parallel > 1:
        raise TrainingError(
            "doge takes gradients of whole weights; it needs zero_stage 0, 1 or 2 and expert_parallel 1"
        )
    if params.balance.loss != "none" or params.balance.z_loss:
        raise TrainingError("doge takes gradients of the cross-entropy alone; set balance: {loss: none, z_loss: 0}")
    if params.batch % len(shares) or max(shares.values()) - min(shares.values()) > 1e-6:
        raise TrainingError(
            f"doge needs every domain in every batch; make batch = {params.batch} a multiple of the {len(shares)} "
            "domains, and their weights equal"
        )


class Alignment(Estimating):
    """Weights by products of gradients."""

    def __init__(
        self,
        params: Pretrain,
        engine: Engine,
        *,
        domains: list[str],
        target: Mapping[str, float] | None,
        windows: Mapping[str, NDArray[np.int64]],
        objective: Objective,
        process: Process,
    ) -> None:
        """Args:
        target: weights of the domains whose loss is to fall; None: each domain's, by the gradients of the others.
        windows: held-out windows of the target's domains, int64 [n, seq_len]; each step takes as many of each as the
            batch has of a domain, in turn.
        objective: the run's, for its balancer's counts.
        """
        super().__init__(domains)
        self._params, self._engine, self._process = params, engine, process
        self._target, self._windows = target, windows
        # Around the bare model: DeepSpeed sees one backward pass, that of the weighted sum.
        self._losses = Objective(params, engine.module, balancer=objective.balancer, distiller=None)
        self._parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._each = params.batch // len(domains)

    def backward(self, step: Step) -> list[Losses]:
        """Move the weights by a batch and leave the gradient of the weighted loss in the engine.

        All ranks' batches together have every domain.

        Returns:
            The losses of the windows in the batch's order, as of one micro-batch.
        """
        batch = step.batch
        nats_B = torch.zeros(len(batch.input_ids))
        gradients, norms = {}, {}
        for domain in self.domains:
            rows = np.flatnonzero(np.array(batch.domains) == domain)
            gradient, nats = self._gradient(batches.select(batch, rows) if len(rows) else None)
            nats_B[torch.from_numpy(rows)] = nats
            gradients[domain], norms[domain] = self._clipped(gradient)
        gains = self._gains(gradients, step=step.number)
        weights = self.weights
        if all(math.isfinite(value) for value in (*gains.values(), *norms.values())):  # else the guard judges it
            weights = rules.doge(self.weights, gains=gains, norms=norms, rate=step.rate)
            self.propose(weights, scores=gains)
        self._hand_over(gradients, weights)
        return [Losses(nats_B=nats_B, parts={}, total=nats_B.sum())]

    def _gradient(self, batch: Batch | None) -> tuple[Gradient, torch.Tensor]:
        """The gradient of the mean loss over the windows that all ranks have of a domain, and this rank's losses."""
        tokens = torch.tensor(float(predicted_tokens(batch.labels).sum()) if batch else 0.0, dtype=torch.float64)
        tokens = tokens.to(self._process.device)
        torch.distributed.all_reduce(tokens)
        total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self._parameters]
        nats = []
        for start in range(0, len(batch.input_ids) if batch else 0, self._params.micro_batch):
            assert batch is not None
            rows = slice(start, start + self._params.micro_batch)
            losses = self._losses(batch, rows=rows, device=self._process.device)
            nats.append(losses.nats_B.detach().float().cpu())
            loss = losses.nats_B.sum() / tokens.clamp(min=1).to(losses.nats_B)
            for kept, new in zip(total, torch.autograd.grad(loss, self._parameters, allow_unused=True), strict=True):
                if new is not None:
                    kept += new
        if self._process.world_size > 1:
            for kept in total:
                torch.distributed.all_reduce(kept)
        return total, torch.cat(nats) if nats else torch.zeros(0)

    def _clipped(self, gradient: Gradient) -> tuple[Gradient, float]:
        """A gradient scaled to a norm of at most `clip`, in place, and its norm, as the repository has it."""
        norm = float(torch.nn.utils.get_total_norm(gradient))
        if norm > self._params.clip:
            for tensor in gradient:
                tensor *= self._params.clip / norm
        return gradient, min(norm, self._params.clip)

    def _gains(self, gradients: Mapping[str, Gradient], *, step: int) -> dict[str, float]:
        """The product of each domain's gradient with what is to fall."""
        if self._target is None:
            rows = [*gradients.values()]
            products = np.array([[_product(one, other) for other in rows] for one in rows])
            return dict(zip(gradients, rules.gains(products).tolist(), strict=True))
        gains = dict.fromkeys(gradients, 0.0)
        for domain, weight in self._target.items():
            towards, _ = self._clipped(self._gradient(self._held_out(domain, step=step))[0])
            gains = {name: gains[name] + weight * _product(own, towards) for name, own in gradients.items()}
        return gains

    def _held_out(self, domain: str, *, step: int) -> Batch | None:
        """This rank's windows of a target domain in a step."""
        every = self._windows[domain]
        count = min(self._each, len(every))
        mine = np.arange(step * count, (step + 1) * count)[self._process.rank :: self._process.world_size] % len(every)
        if not len(mine):
            return None
        return batches.plain(every[mine], domain=domain)

    def _hand_over(self, gradients: Mapping[str, Gradient], weights: Mapping[str, float]) -> None:
        """Make the engine's gradient the weighted sum: that of <parameter, sum>, whose value says nothing."""
        sums = [
            functools.reduce(torch.add, (weights[domain] * gradients[domain][i] for domain in gradients))
            for i in range(len(self._parameters))
        ]
        accumulated = self._params.batch // self._params.micro_batch // self._process.world_size
        for number in range(accumulated):  # DeepSpeed divides by their number; all of it goes into the first
            if number:
                self._engine.next_micro_batch()
            factor = float(accumulated) if number == 0 else 0.0
            products: list[Any] = [
                (parameter * (factor * total).to(parameter.dtype)).sum()
                for parameter, total in zip(self._parameters, sums, strict=True)
            ]
            self._engine.backward(torch.stack([product.float() for product in products]).sum())


def _product(one: Gradient, other: Gradient) -> float:
    return math.fsum(float(torch.dot(a.flatten(), b.flatten())) for a, b in zip(one, other, strict=True))
