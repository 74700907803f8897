"""A swarm: proxies trained on mixes around a prior, one file each, which every law is fitted to.

    runs/<pipeline>/swarm/<key>.json     a finished unit: weights, seed, losses, or why it has none

A unit is written by a rename, and known by a digest of all that it depends on: checkpoint, text, mix, seed, settings,
code. So work that was killed goes on with the units that are missing; more units, another method or another target
take over those that are there; and a unit of another student or corpus is not taken. When domains are added, units
that were trained without them still say what the others do, and only the rest is trained anew (mixture reuse,
arXiv 2602.12237).
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks import scratch
from tasks.corpus.prepare import stage
from tasks.mixture.problem import Problem, prior
from tasks.plugins.proxy_runs import models, units
from tasks.plugins.proxy_runs.units import Setup
from tasks.workers import cores, default_environment

SMOOTHED, STRENGTHS, MOST, LEAST = 0.5, (0.1, 5.0), 15.0, 2e-4
"""RegMix's swarm (arXiv 2407.01492): the exponent of the prior, the ends of the concentrations, how often its prior a
domain may have, and the share below which it has none."""
TRIES = 100_000
FILES = "[0-9a-f]*.json"
"""Units, by their keys."""

Runner = Callable[[Callable[[Any], None], list[Any]], None]
"""Calls a picklable function with every unit, in any order, anywhere, and raises if a call does."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One training: the mix, the seed of its batches, and the name of its file."""

    key: str
    weights: dict[str, float]
    seed: int
    phase: str = "swarm"
    """What a runner calls the units."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The units that are to be there, and those of fewer domains that are there and count."""

    setup: Setup
    folder: Path
    """Of the finished units."""
    work: Path
    """Of the unfinished ones."""
    base: str
    domains: dict[str, str]
    units: list[Unit]
    reused: list[dict[str, Any]]
    others: int
    """Finished units that do not count."""

    def path(self, unit: Unit) -> Path:
        """The file of a unit."""
        return self.folder / f"{unit.key}.json"

    def pending(self) -> list[Unit]:
        """Units that are not finished."""
        return [unit for unit in self.units if not self.path(unit).exists()]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a swarm saw. Shapes: U units, D domains."""

    domains: list[str]
    """That are trained on."""
    weights_UD: NDArray[np.float64]
    losses: dict[str, NDArray[np.float64]]
    """Domain -> nats per token [U]; NaN where a unit was trained before the domain was there."""
    evidence: dict[str, Any]
    """units, left_out, cost."""

    def of(self, domain: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The mixes of the units that have measured a domain, and their losses on it."""
        seen_U = np.isfinite(self.losses[domain])
        return self.weights_UD[seen_U], self.losses[domain][seen_U]


def mixes(prior: dict[str, float], *, count: int, seed: int) -> list[dict[str, float]]:
    """Different mixes around a prior, each drawn by its own number: more of them begin with the same.

    Dirichlet, with a concentration of the smoothed prior times a strength. The strengths are spread evenly over the
    logarithm by van der Corput's sequence.

    Raises:
        ValueError: no mix keeps below MOST times the prior.
    """
    names, prior_D = list(prior), np.array(list(prior.values()))
    smooth_D = prior_D**SMOOTHED / (prior_D**SMOOTHED).sum()
    low, high = np.log(STRENGTHS)
    drawn = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        strength = np.exp(low + (high - low) * _van_der_corput(i))
        for _ in range(TRIES):
            share_D = rng.dirichlet(smooth_D * strength)
            if not (np.isfinite(share_D).all() and (share_D <= MOST * prior_D).all()):
                continue
            share_D = np.where(share_D < LEAST, 0.0, share_D)
            mix = dict(zip(names, (share_D / share_D.sum()).tolist(), strict=True))
            if mix not in drawn:  # one domain alone comes more than once
                break
        else:
            raise ValueError(
                f"no mix keeps below {MOST:g} times the prior {prior}; give mixture.weights that are more even"
            )
        drawn.append(mix)
    return drawn


def _van_der_corput(i: int) -> float:
    value, base = 0.0, 0.5
    while i:
        value, base, i = value + base * (i & 1), base / 2, i >> 1
    return value


def plan(problem: Problem) -> Plan:
    """The units of a problem, of which some may be finished. Writes the proxy's checkpoint.

    Raises:
        ValueError: too few units for the number of domains, or the settings do not fit.
        FileNotFoundError: the student or the parent is not there.
    """
    assert problem.proxy is not None
    assert problem.swarm is not None
    assert problem.pretrain is not None
    try:
        problem.swarm.require(len(problem.tokens))
    except ValueError as error:
        raise ValueError(f"mixture.swarm.{error}") from None
    start = prior(problem)
    checkpoint = models.make(problem.proxy, parent=problem.model, student=problem.student, folder=problem.work)
    setup = Setup(
        checkpoint=checkpoint,
        corpus=problem.corpus,
        params=units.training(problem.proxy, problem.pretrain),
        also=tuple(domain for domain in problem.target if domain not in problem.tokens),
    )
    folder, base, domains = Path("runs") / problem.pipeline / "swarm", setup.base(), setup.domains()
    reused = _fewer_domains(folder, base=base, domains=domains, trained=set(problem.tokens))
    count = problem.swarm.units
    if reused:  # a law of a new domain's loss is fitted to new units alone
        count = max(count - len(reused), problem.swarm.least(len(problem.tokens)))
    planned = []
    seed = problem.proxy.seed  # one for all: they differ in what the mix changes, not in the windows drawn of a domain
    for weights in mixes(start, count=count, seed=seed):
        key = scratch.fingerprint([base, domains, weights, seed])
        planned.append(Unit(key=key, weights=weights, seed=seed))
    return Plan(
        setup=setup,
        folder=folder,
        work=problem.work / "units",
        base=base,
        domains=domains,
        units=planned,
        reused=reused,
        others=len({path.stem for path in folder.glob(FILES)} - {unit.key for unit in planned}) - len(reused),
    )


def _fewer_domains(folder: Path, *, base: str, domains: dict[str, str], trained: set[str]) -> list[dict[str, Any]]:
    """Finished units over some of the domains alone, whose text is the same."""
    found = []
    for path in sorted(folder.glob(FILES)):
        record = json.loads(path.read_text())
        known = record["domains"]
        if record["base"] == base and known.items() <= domains.items() and set(record["weights"]) < trained:
            found.append(record)
    return found


def observe(problem: Problem, *, run: Runner | None = None) -> Observed:
    """Train what is missing of a problem's swarm, and return what it saw.

    Args:
        run: what runs the units; processes of this machine if None.

    Raises:
        ValueError: too few units are left for a law.
        TrainingError, OSError: a unit cannot be trained; what was finished is kept.
    """
    assert problem.swarm is not None
    planned = plan(problem)
    complete(planned, run=run or processes(problem.swarm.workers))
    shutil.rmtree(planned.work, ignore_errors=True)
    return _observed(planned, problem)


def complete(planned: Plan, *, run: Runner) -> None:
    """Train the units of a plan that are not finished."""
    if pending := planned.pending():
        done = len(planned.units) - len(pending) + len(planned.reused)
        told = f"swarm: {len(pending)} units of {planned.setup.tokens} tokens to train; {done} are there"
        if planned.others:
            told += f", and {planned.others} in {planned.folder} are of other models, text, settings or code"
        print(told, flush=True)
        run(functools.partial(train, planned), pending)


def train(planned: Plan, unit: Unit) -> None:
    """Train one unit, unless it is finished, and write its file."""
    from tasks.pretrain.job import Diverged

    if planned.path(unit).exists():
        return
    workspace = planned.work / unit.key
    record: dict[str, Any] = {
        "base": planned.base, "domains": planned.domains, "weights": unit.weights, "seed": unit.seed,
    }  # fmt: skip
    try:
        record["losses"] = units.train(planned.setup, weights=unit.weights, seed=unit.seed, workspace=workspace)
    except Diverged as error:
        record["diverged"] = str(error).partition(". Kept")[0]
    scratch.write_json(planned.path(unit), record)
    shutil.rmtree(workspace, ignore_errors=True)
    print(f"swarm: unit {unit.key}: {record.get('diverged') or _shown(record['losses'])}", flush=True)


def processes(workers: int) -> Runner:
    """Units in up to `workers` processes of this machine, which share its cores; one of them is this one."""

    def run(function: Callable[[Any], None], pending: list[Any]) -> None:
        if workers == 1 or len(pending) == 1:
            for unit in pending:
                function(unit)
            return
        threads = str(max(1, cores() // min(workers, len(pending))))
        with default_environment({"OMP_NUM_THREADS": threads}):
            stage.processes(workers)(function, pending)

    return run


def _observed(planned: Plan, problem: Problem) -> Observed:
    assert problem.swarm is not None
    records = {unit.key: json.loads(planned.path(unit).read_text()) for unit in planned.units}
    sound = [record for record in (*planned.reused, *records.values()) if "losses" in record]
    left_out = [{"unit": key, "why": record["diverged"]} for key, record in records.items() if "losses" not in record]
    domains, setup = list(problem.tokens), planned.setup
    if len(sound) < (least := len(domains) + 2):
        raise ValueError(
            f"mixture.swarm: {len(left_out)} of {len(records)} units diverged, and {len(sound)} are left, of which a "
            f"law over {len(domains)} domains takes {least}; lower mixture.proxy.learning_rate"
        )
    count = len(sound) + len(left_out)
    cost = units.cost(problem, tokens=count * setup.tokens, flops=count * setup.flops())
    listed = [{name: record[name] for name in ("weights", "losses", "seed")} for record in sound]
    return Observed(
        domains=domains,
        weights_UD=np.array([[record["weights"].get(domain, 0.0) for domain in domains] for record in sound]),
        losses={
            domain: np.array([record["losses"].get(domain, np.nan) for record in sound]) for domain in planned.domains
        },
        evidence={"units": listed, "left_out": left_out, "cost": cost},
    )


def _shown(losses: dict[str, float]) -> str:
    return "  ".join(f"{domain} {loss:.4f}" for domain, loss in losses.items())
