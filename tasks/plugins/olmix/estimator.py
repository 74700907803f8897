"""Olmix (arXiv 2602.12237): a log-linear law of each domain's loss, and the mix that is best by them near a prior.

    L(p) = exp(c) + exp(a · p)

c is what no mix removes. The proposal minimises the target's loss by these laws plus a KL divergence to the prior. It
is a convex problem, which cvxpy states and Clarabel solves, so it has one answer.

Shapes: U units, D domains.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.mixture import repetition
from tasks.mixture.problem import Estimate, Problem, prior
from tasks.plugins.proxy_runs import evidence, swarm
from tasks.plugins.proxy_runs.swarm import Observed

Array = NDArray[np.float64]
KAPPA = 0.05
"""Of the KL divergence to the prior."""
HUBER = 0.02
"""Nats; the loss of the fit is quadratic below and linear above."""
FLOORS, POLISHED = 16, 4
"""Starts of a fit, each with its own share of the smallest loss as what no mix removes, and how many of the best of
them the search goes on from."""
RANGE = (-20.0, 4.0)
"""Of the constants: no text costs more than exp(4) nats a token, far above a uniform guess."""
BOOTSTRAPS = 40


class Law:
    """A fitted law: c, and a [D]."""

    def __init__(self, constants: Array) -> None:
        self.constants = constants

    def __call__(self, weights_UD: Array) -> Array:
        """Losses [U] in nats."""
        return _law(self.constants, weights_UD)[0]

    @property
    def slope_D(self) -> Array:
        """The a of the law."""
        return self.constants[1:]


def _law(constants: Array, weights_UD: Array) -> tuple[Array, Array]:
    """The law and its gradient by the constants, [U] and [U, D + 1]."""
    floor, rest_U = np.exp(constants[0]), np.exp(weights_UD @ constants[1:])
    return floor + rest_U, np.column_stack([np.full(len(rest_U), floor), weights_UD * rest_U[:, None]])


def fit(weights_UD: Array, losses_U: Array, *, start: Law | None = None) -> Law:
    """The law of some mixes [U, D] and their losses [U], by L-BFGS on Huber's loss.

    Given the floor exp(c), the law is linear in the logarithm, so least squares start the search well: from FLOORS
    floors between none and nearly the smallest loss, and from a law that is near.
    """
    from scipy import optimize

    def objective(constants: Array) -> tuple[float, Array]:
        predicted_U, gradient = _law(constants, weights_UD)
        error_U = predicted_U - losses_U
        small_U = np.abs(error_U) <= HUBER
        value_U = np.where(small_U, 0.5 * error_U**2, HUBER * (np.abs(error_U) - 0.5 * HUBER))
        return float(value_U.sum()), np.clip(error_U, -HUBER, HUBER) @ gradient

    starts = [start.constants] if start else []
    for share in np.linspace(0.02, 0.98, FLOORS):
        floor = share * losses_U.min()
        slope_D = np.linalg.lstsq(weights_UD, np.log(losses_U - floor), rcond=None)[0]
        starts.append(np.concatenate([[np.log(floor)], slope_D]).clip(*RANGE))
    starts = sorted(starts, key=lambda constants: objective(constants)[0])[:POLISHED]
    bounds = [RANGE] * (1 + weights_UD.shape[1])
    found = [optimize.minimize(objective, begin, jac=True, method="L-BFGS-B", bounds=bounds) for begin in starts]
    return Law(min(found, key=lambda each: each.fun).x)


def propose(
    laws: dict[str, Law], *, target: dict[str, float], prior_D: Array, caps_D: Array, kappa: float = KAPPA
) -> Array:
    """The mix [D] of the smallest target by the laws, plus `kappa` times its KL divergence to the prior.

    Args:
        target: weights over the laws.
        caps_D: no domain has more.

    Raises:
        ValueError: the caps sum to less than 1.
    """
    import cvxpy

    cp: Any = cvxpy  # it takes its functions in by `*`, which mypy does not follow
    if caps_D.sum() < 1:
        raise ValueError(f"the caps on repetition sum to {caps_D.sum():.3f}, and shares to 1; train on fewer tokens")
    mix_D = cp.Variable(len(prior_D))
    loss = sum(weight * cp.exp(laws[name].slope_D @ mix_D) for name, weight in target.items())
    near = kappa * cp.sum(cp.rel_entr(mix_D, prior_D))
    problem = cp.Problem(cp.Minimize(loss + near), [cp.sum(mix_D) == 1, mix_D >= 0, mix_D <= np.minimum(caps_D, 1)])
    problem.solve(solver=cp.CLARABEL)
    if mix_D.value is None:
        raise ValueError(f"the proposal could not be solved ({problem.status}); more units make the laws tamer")
    found_D: Array = np.clip(np.asarray(mix_D.value, dtype=np.float64), 0, None)
    found_D /= found_D.sum()
    return found_D


def solve(problem: Problem, seen: Observed) -> tuple[Array, dict[str, Any]]:
    """The proposal [D] of a swarm, and the evidence of the fit."""
    target, seed = problem.target, problem.proxy.seed if problem.proxy else 0
    prior_D = np.array([prior(problem)[domain] for domain in seen.domains])
    data = {domain: seen.of(domain) for domain in target}
    laws = {domain: fit(*data[domain]) for domain in target}
    mix_D = propose(laws, target=target, prior_D=prior_D, caps_D=repetition.caps(problem))
    measured_U = sum(weight * seen.losses[domain] for domain, weight in target.items())
    assert isinstance(measured_U, np.ndarray)
    whole_U = np.isfinite(measured_U)  # by all domains of the target
    predicted_U = sum(
        weight * evidence.held_out(fit, seen.weights_UD[whole_U], seen.losses[domain][whole_U], seed=seed)
        for domain, weight in target.items()
    )
    proposals = []
    for chosen in evidence.resampled(BOOTSTRAPS, units=len(measured_U), seed=seed):
        again = {}
        for domain in target:
            drawn = chosen[np.isfinite(seen.losses[domain][chosen])]
            again[domain] = fit(seen.weights_UD[drawn], seen.losses[domain][drawn], start=laws[domain])
        proposals.append(propose(again, target=target, prior_D=prior_D, caps_D=repetition.caps(problem)))
    return mix_D, {
        "prior": prior(problem),
        **evidence.spread(seen.domains, proposals),
        "fit": evidence.agreement(np.asarray(predicted_U), measured_U[whole_U]),
    }


def estimate(problem: Problem) -> Estimate:
    """The proposal of a swarm that is trained where it is not there yet."""
    evidence.require("cvxpy", method="olmix")
    seen = swarm.observe(problem)
    mix_D, figures = solve(problem, seen)
    return Estimate(weights=dict(zip(seen.domains, mix_D.tolist(), strict=True)), evidence=seen.evidence | figures)
