"""What a method of weighing domains is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks import settings


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs of an estimator."""

    tokens: dict[str, int]
    """Training tokens of each domain of the corpus."""
    weights: dict[str, float] | None
    """The settings' `mixture.weights`, over exactly the corpus's domains; not normalised."""
    alpha: float | None
    """The exponent of `temperature`."""
    budget: int
    """Tokens that training reads."""
    max_epochs: float
    corpus: Path
    model: Path
    """The dense checkpoint."""
    seq_len: int
    windows: int
    pipeline: str = ""
    """Whose weights these are."""
    work: Path = Path("work")
    """Keeps unfinished work."""
    student: Path = Path("moe")
    """The split model, a checkpoint."""
    target: dict[str, float] = field(default_factory=dict)
    """What a method with a proxy minimises: weights, of sum 1, on the losses of these domains."""
    proxy: settings.Proxy | None = None
    swarm: settings.Swarm | None = None
    mixture: settings.Mixture | None = None
    """The section of the settings, where a plug-in reads fields of its own."""
    seeds: int = 1
    """Trainings whose mean is the estimate of a method that estimates while a proxy trains."""
    pretrain: settings.Pretrain | None = None
    """How the result will be trained; a proxy is trained alike."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Weights (normalised and capped by the caller) and the figures they rest on."""

    weights: dict[str, float]
    evidence: dict[str, Any] = field(default_factory=dict)


def normalise(weights: dict[str, float]) -> dict[str, float]:
    """Weights over the same domains with sum 1."""
    total = sum(weights.values())
    return {domain: weight / total for domain, weight in weights.items()}


def prior(problem: Problem) -> dict[str, float]:
    """The settings' weights, or shares proportional to the training tokens, with sum 1.

    Raises:
        ValueError: one is 0, which has no logarithm.
    """
    weights = problem.weights or {domain: float(tokens) for domain, tokens in problem.tokens.items()}
    if zeros := [domain for domain, weight in weights.items() if weight <= 0]:
        raise ValueError(
            f"the prior of {', '.join(zeros)} is 0, and its logarithm is taken; give it a positive mixture.weights, "
            "or leave it out of the corpus"
        )
    return normalise(weights)
