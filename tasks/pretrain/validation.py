"""Validation losses during training, and the dense parent's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.pretrain.job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.pretrain.launch.process import Process


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The windows, the same at every evaluation, and the dense parent's loss on them if it was measured."""

    windows: dict[str, np.ndarray]
    """Domain -> int64 [n, seq_len]."""
    references: dict[str, float] | None
    """Domain -> nats per token of the dense parent on these windows; None if the mixture doesn't know them."""

    @classmethod
    def load(cls, job: Job, evidence: dict[str, Any]) -> Validation:
        """Choose the windows.

        They are some of those that the mixture stage measured the parent on, of the same length, if it did and they
        are enough: student and parent are then compared on the same text.

        Args:
            job: whose corpus and settings.
            evidence: of its mixture.json.
        """
        from tasks.corpus.sampling import windows

        params = job.params
        losses: dict[str, list[float]] = evidence.get("window_losses") or {}
        measured: int = evidence["windows"] if losses else 0
        if params.eval_windows > measured:
            every = windows.validation(job.corpus, seq_len=params.seq_len, count=params.eval_windows)
            return cls(windows=every, references=None)
        every = windows.validation(job.corpus, seq_len=evidence["seq_len"], count=measured)
        chosen = {domain: _spread(len(ids), params.eval_windows) for domain, ids in every.items()}
        return cls(
            windows={domain: ids[chosen[domain]] for domain, ids in every.items()},
            references={domain: float(np.mean([losses[domain][i] for i in chosen[domain]])) for domain in every},
        )

    def measure(self, model: PreTrainedModel, *, batch: int, process: Process) -> tuple[dict[str, float], np.ndarray]:
        """What `evaluate` gives, and tokens per sparse layer and expert, int64 [L, E]; the same on every rank.

        Args:
            batch: windows per forward pass.
        """
        import torch

        from tasks.moe.routing import expert_load

        with expert_load(model) as load_LE:
            losses = self.evaluate(model, batch=batch, rank=process.rank, world_size=process.world_size)
        load = torch.from_numpy(load_LE).to(process.device)
        torch.distributed.all_reduce(load)
        return losses, load.cpu().numpy()

    def evaluate(self, model: PreTrainedModel, *, batch: int, rank: int, world_size: int) -> dict[str, float]:
        """Loss per domain in nats per predicted token, without any auxiliary loss; the same on every rank.

        Every rank makes the same number of forward passes (ZeRO-3 gathers weights in each), also those that have no
        window of their own, and every window is counted on one rank, so the figures do not depend on the world size
        beyond rounding.

        Args:
            model: dense or sparse.
            batch: windows per forward pass.
            rank: of this process; all call it together.
            world_size: how many there are; process groups are needed from 2 on.
        """
        import torch

        from tasks.moe.loss import window_nll

        every = np.concatenate(list(self.windows.values()))
        padded = -(-len(every) // world_size) * world_size
        mine = np.arange(padded)[rank::world_size]
        nll = window_nll(model, every[mine % len(every)], batch=batch)
        own = mine < len(every)
        total = torch.zeros(len(every), dtype=torch.float64)
        total[torch.from_numpy(mine[own])] = torch.from_numpy(nll[own])
        if world_size > 1:
            total = total.to(model.device)
            torch.distributed.all_reduce(total)
        losses, start = {}, 0
        for domain, ids in self.windows.items():
            part = total[start : start + len(ids)]
            losses[domain] = float(part.mean()) / (ids.shape[1] - 1)
            start += len(ids)
        return losses


def _spread(total: int, count: int) -> np.ndarray:
    """`count` of `total` indices (all if fewer), evenly spread."""
    count = min(count, total)
    return (np.arange(count) * total) // count
