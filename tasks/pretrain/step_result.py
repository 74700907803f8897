"""The losses, loads and times of one step on all ranks, exchanged in a single reduction.

S slots of the global batch, of which rank r of R has r, r + R, …; L sparse layers, E experts of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tasks.pretrain.loss.losses import Losses, predicted_tokens

if TYPE_CHECKING:
    from tasks.corpus.sampling.loader import Batch
    from tasks.pretrain.launch.process import Process


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The same on every rank."""

    losses: dict[str, np.ndarray]
    """`loss`, the cross-entropy, and the objective's parts: float64 [S], of a slot the sum over its predicted tokens,
    or for the parts in `of_batches` its micro-batch's."""
    of_batches: frozenset[str]
    domains: list[str]
    windows: list[int]
    predicted_S: np.ndarray
    """Predicted tokens of each slot, int64."""
    load_LE: np.ndarray
    """Tokens per sparse layer and expert, int64."""
    seconds_R: list[float]
    """Of each rank's forward and backward passes."""

    @property
    def predicted(self) -> int:
        """Predicted tokens of the step."""
        return int(self.predicted_S.sum())

    @property
    def loss(self) -> float:
        """The mean cross-entropy; not finite if any of the losses of any window isn't."""
        mean = self.mean("loss")
        return mean if np.isfinite(sum(self.losses.values())).all() else mean + float("nan")

    def mean(self, name: str) -> float:
        """Of a loss, as it enters the step: over its predicted tokens, or over its micro-batches."""
        values = self.losses[name]
        return float(values.mean() if name in self.of_batches else values.sum() / max(self.predicted, 1))

    def of_domain(self, domain: str) -> float:
        """The mean cross-entropy over a domain's predicted tokens; NaN where there are none."""
        mine = np.array(self.domains) == domain
        count = self.predicted_S[mine].sum()
        return float(self.losses["loss"][mine].sum() / count) if count else float("nan")

    def windows_by_domain(self) -> dict[str, int]:
        return dict(Counter(self.domains))

    def suspects(self) -> list[tuple[str, int]]:
        """Domain and window of the slots whose loss isn't finite; of all if it's not that."""
        bad = ~np.isfinite(sum(self.losses.values()))
        every = list(zip(self.domains, self.windows, strict=True))
        return [slot for slot, is_bad in zip(every, bad, strict=True) if is_bad] or every


def collect(
    batch: Batch,
    losses: Sequence[Losses],
    *,
    names: Sequence[str],
    domains: Sequence[str],
    load_LE: np.ndarray,
    seconds: float,
    slots: int,
    process: Process,
) -> StepResult:
    """Exchange the results of this rank with the others; every rank must call it.

    Args:
        batch: this rank's slots.
        losses: of its micro-batches, in order.
        names: of the parts, the same on every rank.
        domains: all there are, in the same order on every rank.
        load_LE: this rank's tokens per sparse layer and expert.
        seconds: of its forward and backward passes.
        slots: S.
    """
    import torch

    own = torch.zeros(4 + len(names), slots, dtype=torch.float64)
    mine = slice(process.rank, None, process.world_size)
    own[0, mine] = torch.tensor([domains.index(domain) for domain in batch.domains], dtype=torch.float64)
    own[1, mine] = torch.tensor(batch.windows, dtype=torch.float64)
    own[2, mine] = torch.from_numpy(predicted_tokens(batch.labels)).double()
    own[3, mine] = torch.cat([each.nats_B.detach() for each in losses]).double().cpu()
    for row, name in enumerate(names, start=4):
        parts = [each.parts[name].detach().expand_as(each.nats_B) for each in losses]
        own[row, mine] = torch.cat(parts).double().cpu()
    seconds_R = torch.zeros(process.world_size, dtype=torch.float64)
    seconds_R[process.rank] = seconds
    load = torch.from_numpy(load_LE).double().flatten()
    every = torch.cat([own.flatten(), seconds_R, load]).to(process.device)
    torch.distributed.all_reduce(every)
    table, seconds_R, load = every.cpu().split([own.numel(), len(seconds_R), len(load)])
    domain, window, predicted, *rows = table.view_as(own).numpy()
    return StepResult(
        losses=dict(zip(["loss", *names], rows, strict=True)),
        of_batches=frozenset(name for name in names if not losses[0].parts[name].ndim),
        domains=[domains[int(number)] for number in domain],
        windows=window.astype(int).tolist(),
        predicted_S=predicted.astype(np.int64),
        load_LE=load.view(load_LE.shape).numpy().astype(np.int64),
        seconds_R=seconds_R.tolist(),
    )
