"""The training loss: cross-entropy over packed windows, load balance, distillation from the parent, terms of hooks.

Cross-entropy and distillation are means over the N predicted tokens of the whole step, all micro-batches and ranks
together: every token weighs the same, whatever its window, and the sum doesn't depend on who computes which window. N
is known from the data before the first forward pass (`Batch.step_targets`). A step has M = batch / micro_batch
micro-batches on all R ranks together. DeepSpeed divides the loss of each by the M / R that its rank accumulates, and
averages the gradients over the R ranks: the total of a micro-batch enters the step with 1 / M. So it is M / N times
the sum over the micro-batch's own tokens, which is their plain mean where all windows have as many targets.

The balance losses are those of each micro-batch (`balance`), and so are the terms of hooks; the step has their mean.

Shapes: B windows of one forward pass, L tokens of a window, T = B L tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.sampling.loader import IGNORED, Batch
from tasks.pretrain import batches
from tasks.pretrain.loss import fused_loss
from tasks.pretrain.loss.losses import Losses
from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tasks.pretrain.engine.interface import Engine
    from tasks.pretrain.loss.balance import Balancer
    from tasks.pretrain.loss.distil import Distiller


class Objective:
    """The loss of a run, composed by its settings."""

    def __init__(
        self,
        params: Pretrain,
        model: nn.Module | Engine,
        *,
        balancer: Balancer | None,
        distiller: Distiller | None,
    ) -> None:
        """`model`: a stock causal language model, or the engine around it; without a balancer if it is dense."""
        self.params, self.model = params, model
        self.balancer, self.distiller = balancer, distiller
        self.factors: Callable[..., torch.Tensor] | None = None
        """What the cross-entropy of each window counts [B], from the losses of its tokens, the batch and `rows`; all
        alike if None. A hook sets it."""
        self.terms: dict[str, Callable[[], torch.Tensor]] = {}
        """Scalars that hooks add to the loss of each micro-batch, by name, once the model has computed it."""
        self.stock: Any = getattr(model, "module", model)

    @property
    def parts(self) -> list[str]:
        """Names of the parts, in order, the same at every step and on every rank."""
        balance, distill = self.params.balance, self.params.distill
        named = {
            "balance": self.balancer and balance.loss not in {"none", "bias"} and balance.coefficient,
            "z": self.balancer and balance.z_loss,
            "kl": distill and distill.logits,
            "hidden": distill and distill.hidden,
        }
        return [*(name for name, asked in named.items() if asked), *self.terms]

    def __call__(self, batch: Batch, *, rows: slice, device: torch.device) -> Losses:
        """The losses of the windows `rows` of a batch."""
        import torch

        from tasks.moe import routing

        ids = torch.from_numpy(batch.input_ids[rows]).to(device)
        target_BL = targets(batch.labels[rows]).to(device)
        distiller, distill = self.distiller, self.params.distill
        fused = fused_loss.available(device) and not (distill and distill.logits)
        with contextlib.ExitStack() as stack:
            routed = stack.enter_context(routing.record(self.stock)) if self.balancer else []
            if fused:
                stack.enter_context(fused_loss.in_place_of_logits(self.stock, target_BL, ignored=IGNORED))
            out = self.model(
                input_ids=ids,
                use_cache=False,
                output_router_logits=False,
                output_hidden_states=bool(distiller and distiller.needs_hidden),
                **batches.documents(batch, rows, device),
            )
        distilled = distiller.losses(batch, rows=rows, out=out, target_BL=target_BL) if distiller else {}
        if "cross_entropy" in distilled:  # computed along with the divergence, in one pass over the logits
            nats_B = weighted_B = distilled.pop("cross_entropy")
        else:
            nats_BL = _per_token(out.logits, target_BL, fused=fused)
            nats_B = weighted_B = nats_BL.sum(1)
            if self.factors is not None:
                weighted_B = self.factors(nats_BL, batch, rows=rows) * nats_B
        scale = self.params.batch / self.params.micro_batch / max(batch.step_targets, 1)
        total = scale * (distill.cross_entropy if distill else 1.0) * weighted_B.sum()
        parts: dict[str, torch.Tensor] = {}
        if self.balancer:
            parts |= self.balancer.losses(routed, real_T=_real(batch.labels[rows], device))
        if distill:
            share = {"kl": distill.logits, "hidden": distill.hidden}
            parts |= {name: share[name] * value_B for name, value_B in distilled.items()}
        parts |= {name: term() for name, term in self.terms.items()}
        for value in parts.values():
            total = total + (scale * value.sum() if value.ndim else value)
        return Losses(nats_B=nats_B, parts=parts, total=total)


def targets(labels_BL: NDArray[np.int64]) -> torch.Tensor:
    """The token that follows each one, IGNORED where none is to be predicted: int64 [B, L]."""
    import torch
    import torch.nn.functional as F

    return F.pad(torch.from_numpy(labels_BL)[:, 1:], (0, 1), value=IGNORED)  # all L: slicing logits would copy them


def _per_token(logits: torch.Tensor, target_BL: torch.Tensor, *, fused: bool) -> torch.Tensor:
    import torch.nn.functional as F

    if fused:
        nats = logits
    else:
        nats = F.cross_entropy(
            logits.float().flatten(0, 1), target_BL.flatten(), ignore_index=IGNORED, reduction="none"
        )
    return nats.view_as(target_BL)


def _real(labels_BL: NDArray[np.int64], device: torch.device) -> torch.Tensor | None:
    """Which tokens are text, bool [T]: those up to each window's last predicted one; None if all are."""
    import torch

    real_BL = np.logical_or.accumulate(labels_BL[:, ::-1] != IGNORED, axis=1)[:, ::-1].copy()
    real_BL[:, 0] = True  # a window begins with text, also where nothing in it is predicted
    return None if real_BL.all() else torch.from_numpy(real_BL).flatten().to(device)
