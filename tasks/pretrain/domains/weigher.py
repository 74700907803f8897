"""The weights that a run estimates, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


class Weigher:
    """The weights in use and their mean. Every rank has one and comes to the same numbers.

    A step proposes other weights, which count when the step was taken.
    """

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

    def record(self) -> dict[str, Any]:
        """For the log."""
        return {"weights": self.weights, "scores": self.scores}

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, JSON-able."""
        return {"weights": self.weights, "scores": self.scores, "sums": self._sums, "count": self._count}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.weights, self.scores = dict(saved["weights"]), dict(saved["scores"])
        self._sums, self._count = dict(saved["sums"]), saved["count"]
        self._proposed = None
