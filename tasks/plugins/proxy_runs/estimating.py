"""The hook that the estimators inside a run share: the weights so far, their mean, and what fits no estimate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tasks.pretrain.hook import Hook, Kind, Step
from tasks.pretrain.job import Job, TrainingError
from tasks.settings.pretrain import FIXED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tasks.pretrain.step_result import StepResult


class Estimating(Hook):
    """The weights in use and their mean. Every rank has one and comes to the same numbers.

    A step proposes other weights, which count when the step was taken.
    """

    name = "estimate"

    def __init__(self, domains: Iterable[str]) -> None:
        self.domains = list(domains)
        self.weights = dict.fromkeys(self.domains, 1 / len(self.domains))
        self.scores: dict[str, float] = {}
        """What moved the weights last, by domain: an excess in nats, or a gradient product."""
        self._sums, self._count = dict.fromkeys(self.domains, 0.0), 0
        self._proposed: tuple[dict[str, float], dict[str, float]] | None = None

    @property
    def mean(self) -> dict[str, float]:
        """The estimate: the mean of the weights after each move so far; those at the start before the first."""
        if not self._count:
            return dict(self.weights)
        total = math.fsum(self._sums.values())
        return {domain: value / total for domain, value in self._sums.items()}

    def propose(self, weights: Mapping[str, float], *, scores: Mapping[str, float]) -> None:
        """Keep weights until the step that they are from is taken."""
        self._proposed = dict(weights), dict(scores)

    def settle(self, *, taken: bool = True) -> None:
        """Use what was proposed; forget it if its step was given up."""
        proposed, self._proposed = self._proposed, None
        if proposed is not None and taken:
            self.weights, self.scores = proposed
            self._sums = {domain: self._sums[domain] + weight for domain, weight in self.weights.items()}
            self._count += 1

    def after_step(self, step: Step, result: StepResult, *, sound: bool) -> None:
        self.settle(taken=sound)

    def record(self, kind: Kind) -> Mapping[str, Any]:
        if kind == "run":
            return {"estimate": self.mean}
        return {"estimate": {"weights": self.weights, "scores": self.scores}} if kind == "step" else {}

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, JSON-able."""
        return {"weights": self.weights, "scores": self.scores, "sums": self._sums, "count": self._count}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.weights, self.scores = dict(saved["weights"]), dict(saved["scores"])
        self._sums, self._count = dict(saved["sums"]), saved["count"]
        self._proposed = None


def check(job: Job, method: str, shares: Mapping[str, float]) -> None:
    """Raise TrainingError unless a job fits an estimate. `shares`: the job's mixture, sum 1."""
    if len(shares) < 2:
        raise TrainingError(
            f"{method} weighs domains against each other, and {job.corpus} has one: {', '.join(shares)}"
        )
    if zeros := [domain for domain, share in shares.items() if share <= 0]:
        raise TrainingError(
            f"{method} needs text of every domain, and {', '.join(zeros)} has the weight 0 in {job.mixture}; give it "
            "a small one, or leave it out of the corpus"
        )
    for field in ("distill", *FIXED):
        if getattr(job.params, field, None) is not None:
            raise TrainingError(
                f"pretrain.{field} and an estimate by {method} both weigh the loss or the domains; drop one"
            )


def normalised(target: Mapping[str, float]) -> dict[str, float]:
    """The weights of a target with sum 1."""
    total = sum(target.values())
    return {domain: weight / total for domain, weight in target.items()}


def held_out(job: Job, target: Mapping[str, float], *, count: int) -> dict[str, NDArray[np.int64]]:
    """Windows of each domain of a target, int64 [<= count, seq_len]: of the validation split, of the test split where
    nothing else is held out because nothing is trained on.

    Raises:
        TrainingError: the corpus has no such domain.
    """
    from tasks.corpus.sampling import windows

    if not target:
        return {}
    seq_len = job.params.seq_len
    every = windows.validation(job.corpus, seq_len=seq_len, count=count)
    if target.keys() - every.keys():
        every |= windows.unseen(job.corpus, seq_len=seq_len, count=count)
    if unknown := sorted(target.keys() - every.keys()):
        raise TrainingError(
            f"mixture.target: {job.corpus} has no domain {', '.join(unknown)}; it has {', '.join(sorted(every))}"
        )
    return {domain: every[domain] for domain in target}
