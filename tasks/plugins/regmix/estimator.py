"""RegMix (arXiv 2407.01492): trees predict the target's loss from the mix, and the best of many simulated mixes win.

LightGBM with the settings of the paper's notebook. What stops the boosting early is held out of the fit's own units;
the notebook takes the mixes on which it then reports.

Shapes: U units, D domains.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.mixture import repetition
from tasks.mixture.problem import Estimate, Problem, prior
from tasks.plugins.proxy_runs import evidence, swarm
from tasks.plugins.proxy_runs.evidence import Law
from tasks.plugins.proxy_runs.swarm import Observed

Array = NDArray[np.float64]
SETTINGS = {
    "objective": "regression", "metric": ["l1", "l2"], "learning_rate": 1e-2, "seed": 42, "verbosity": -1,
    "num_threads": 1, "deterministic": True, "force_col_wise": True,
}  # fmt: skip
ROUNDS = 1000
PATIENCE = 3
"""Rounds without a smaller loss on the held-out units, after which boosting stops."""
HELD_OUT = 5
"""One of so many units stops the boosting."""
LEAF = 20
"""Units of a leaf, LightGBM's own; fewer where there are fewer than 20 leaves of them, else no tree would split."""
SIMULATED, BEST = 100_000, 128
BOOTSTRAPS, FEWER = 20, 16
"""Fits to resampled units, each of which looks at one of so many simulated mixes and takes the same share of them."""


def fit(weights_UD: Array, losses_U: Array, *, seed: int = 42) -> Law:
    """Trees that predict the losses [U] of mixes [U, D]."""
    out_U = np.random.default_rng(seed).permutation(len(losses_U)) % HELD_OUT == 0
    return boosted(weights_UD[~out_U], losses_U[~out_U], stop=(weights_UD[out_U], losses_U[out_U]))


def boosted(weights_UD: Array, losses_U: Array, *, stop: tuple[Array, Array]) -> Law:
    """The same, stopped where the loss on the units of `stop` no longer falls."""
    import lightgbm

    leaf = min(LEAF, max(1, len(losses_U) // LEAF))
    known = lightgbm.Dataset(weights_UD, losses_U)
    model = lightgbm.train(
        {**SETTINGS, "min_data_in_leaf": leaf},
        known,
        num_boost_round=ROUNDS,
        valid_sets=[lightgbm.Dataset(stop[0], stop[1], reference=known)],
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
    return lambda mixes_UD: np.asarray(model.predict(mixes_UD, num_threads=1))


def candidates(prior_D: Array, *, caps_D: Array, seed: int = 42) -> Array:
    """Simulated mixes [N, D] from a Dirichlet distribution of the prior, those that keep the caps if enough do."""
    mixes_ND = np.random.RandomState(seed).dirichlet(prior_D, SIMULATED)  # the notebook's generator
    within_N = (mixes_ND <= caps_D).all(axis=1)
    return mixes_ND[within_N] if within_N.sum() >= BEST else mixes_ND


def propose(law: Law, mixes_ND: Array, *, best: int = BEST) -> Array:
    """The mean of the mixes with the smallest predictions, [D]."""
    mean_D: Array = mixes_ND[np.argsort(law(mixes_ND), kind="stable")[:best]].mean(axis=0)
    return mean_D


def solve(problem: Problem, seen: Observed) -> tuple[Array, dict[str, Any]]:
    """The proposal [D] of a swarm, and the evidence of the fit."""
    seed = problem.proxy.seed if problem.proxy else 0
    shares = prior(problem)
    measured_U = sum(weight * seen.losses[domain] for domain, weight in problem.target.items())
    assert isinstance(measured_U, np.ndarray)
    whole_U = np.isfinite(measured_U)  # by all domains of the target
    weights_UD, measured_U = seen.weights_UD[whole_U], measured_U[whole_U]
    mixes_ND = candidates(np.array([shares[domain] for domain in seen.domains]), caps_D=repetition.caps(problem))
    proposals = [
        propose(fit(weights_UD[chosen], measured_U[chosen]), mixes_ND[::FEWER], best=BEST // FEWER)
        for chosen in evidence.resampled(BOOTSTRAPS, units=len(measured_U), seed=seed)
    ]
    return propose(fit(weights_UD, measured_U), mixes_ND), {
        "prior": shares,
        **evidence.spread(seen.domains, proposals),
        "fit": evidence.agreement(evidence.held_out(fit, weights_UD, measured_U, seed=seed), measured_U),
    }


def estimate(problem: Problem) -> Estimate:
    """The proposal of a swarm that is trained where it is not there yet."""
    evidence.require("lightgbm", method="regmix")
    seen = swarm.observe(problem)
    mix_D, figures = solve(problem, seen)
    return Estimate(weights=dict(zip(seen.domains, mix_D.tolist(), strict=True)), evidence=seen.evidence | figures)
