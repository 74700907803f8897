"""The estimators of domain weights, by name.

The core's are here. A plug-in adds one by `estimate(problem)` in its estimator.py, and its name in its settings.py.
"""

from __future__ import annotations

from collections.abc import Callable

from tasks import plugin
from tasks.mixture import published, repetition
from tasks.mixture.problem import Estimate, Problem, normalise

Estimator = Callable[[Problem], Estimate]
ESTIMATORS: dict[str, Estimator] = {}


def estimator(name: str) -> Callable[[Estimator], Estimator]:
    """Register an estimator under the name that `mixture.method` calls it by."""

    def register(function: Estimator) -> Estimator:
        ESTIMATORS[name] = function
        return function

    return register


def estimate(method: str, problem: Problem) -> Estimate:
    """Run one estimator, normalise its weights to sum 1, and cap the repetition of each domain.

    Raises:
        ValueError: `weights` do not name exactly the domains of the corpus, the method is not known, or the caps
            can't be kept.
    """
    if method not in ESTIMATORS:
        raise ValueError(f"mixture.method = {method!r} is not known; known: {', '.join(ESTIMATORS)}")
    if problem.weights is not None:
        _same_domains(problem.weights, problem.tokens)
    raw = ESTIMATORS[method](problem)
    given = normalise(raw.weights)
    weights, bound = repetition.capped(
        given, tokens=problem.tokens, budget=problem.budget, max_epochs=problem.max_epochs
    )
    evidence = {
        **raw.evidence,
        "epochs": {name: weight * problem.budget / problem.tokens[name] for name, weight in weights.items()},
        "max_epochs": problem.max_epochs,
        "capped": {name: given[name] for name in bound},
    }
    return Estimate(weights=weights, evidence=evidence)


@estimator("uniform")
def uniform(problem: Problem) -> Estimate:
    """Every domain the same share."""
    return Estimate(weights=dict.fromkeys(problem.tokens, 1.0))


@estimator("proportional")
def proportional(problem: Problem) -> Estimate:
    """Shares proportional to the training tokens, so that all domains are repeated equally often."""
    return Estimate(weights={domain: float(tokens) for domain, tokens in problem.tokens.items()})


@estimator("temperature")
def temperature(problem: Problem) -> Estimate:
    """Shares proportional to tokens^alpha (arXiv 1907.05019, section 3): 0 is uniform, 1 proportional."""
    assert problem.alpha is not None
    return Estimate(weights={domain: tokens**problem.alpha for domain, tokens in problem.tokens.items()})


@estimator("unimax")
def unimax(problem: Problem) -> Estimate:
    """As uniform as the cap on repetition allows (arXiv 2304.09151): what `estimate` does with equal shares."""
    return uniform(problem)


ESTIMATORS |= {name: module.estimate for name, module in plugin.modules("estimator").items()}


def _published(mix: str) -> Estimator:
    """The shares of a published mix, for domains of the same names."""
    return lambda problem: Estimate(weights=published.weights(mix, problem.tokens))


for _mix in published.MIXES:
    ESTIMATORS[_mix] = _published(_mix)


@estimator("explicit")
def explicit(problem: Problem) -> Estimate:
    """The shares that the settings give."""
    if problem.weights is None:
        raise ValueError("mixture.method = 'explicit' needs mixture.weights: {domain: weight}")
    return Estimate(weights=dict(problem.weights))


@estimator("reference_loss")
def reference_loss(problem: Problem) -> Estimate:
    """The given shares (or uniform) as a start, and the dense parent's validation losses for a run that moves weights.

    The source model's own loss as target: Sheared-LLaMA (arXiv 2310.06694, section 2.2), without its scaling-law fit.
    """
    from tasks.mixture.reference_loss import measure

    start = problem.weights or uniform(problem).weights
    evidence = measure(problem.model, problem.corpus, seq_len=problem.seq_len, windows=problem.windows)
    return Estimate(weights=dict(start), evidence=evidence)


def _same_domains(weights: dict[str, float], tokens: dict[str, int]) -> None:
    missing, unknown = sorted(tokens.keys() - weights.keys()), sorted(weights.keys() - tokens.keys())
    faults = [f"missing: {', '.join(missing)}"] if missing else []
    faults += [f"not in the corpus: {', '.join(unknown)}"] if unknown else []
    if faults:
        raise ValueError(
            f"mixture.weights must name exactly the corpus's domains ({', '.join(tokens)}); {'; '.join(faults)}. "
            "Give a domain the weight 0 to leave it out"
        )
