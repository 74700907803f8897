"""Aioli in the loop: how the losses fall on mixes of mostly one domain says which to take (arXiv 2411.05735).

The steps are divided into rounds. A round begins with `sweeps` sweeps over all domains, each in an order of its own:
`sweep_steps` steps on the mix about a domain, and an evaluation. From how far each loss fell come the effects of the
single domains (rules.effects), which move the mix (rules.aioli), and the rest of the round is trained on that mix. The
steps that are left over go into the last round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.plugins.proxy_runs import estimating, rules
from tasks.plugins.proxy_runs.estimating import Estimating
from tasks.pretrain.hook import Hook, Kind
from tasks.pretrain.job import TrainingError
from tasks.pretrain.validation import Validation
from tasks.settings.fields import Above, Frozen, Name, Positive

if TYPE_CHECKING:
    from tasks.pretrain.loop import Trainer


class Options(Frozen):
    """Job.options["aioli"]: change the mix of the batches by sweeps over mixes of mostly one domain."""

    updates: Positive
    """The steps are divided into so many rounds; each begins with its sweeps and goes on with the updated mix."""
    sweeps: Positive = 4
    sweep_steps: Positive = 4
    """Steps on the mix about one domain."""
    target: dict[Name, Above] | None = None
    """Domains whose loss is to fall; absent: every trained one's, equally."""


def hooks(trainer: Trainer) -> list[Hook]:
    """The estimator, if the job asks for it."""
    job, params, shares = trainer.job, trainer.params, trainer.sampler.weights
    if "aioli" not in job.options:
        return []
    options = Options(**job.options["aioli"])
    estimating.check(job, "aioli", shares)
    target = estimating.normalised(options.target or dict.fromkeys(shares, 1.0))
    windows = estimating.held_out(job, target, count=params.eval_windows)
    windows = {domain: ids for domain, ids in windows.items() if domain not in shares}

    def unseen() -> dict[str, float]:
        process = trainer.process
        return Validation(windows=windows, references=None).evaluate(
            trainer.engine.module, batch=params.micro_batch, rank=process.rank, world_size=process.world_size
        )

    return [
        Sweeps(
            options,
            domains=list(shares),
            target=target,
            unseen=unseen if windows else None,
            steps=params.steps,
            seed=params.seed,
        )
    ]


class Sweeps(Estimating):
    """Weights by validation losses between sweeps."""

    def __init__(
        self,
        options: Options,
        *,
        domains: Sequence[str],
        target: Mapping[str, float],
        unseen: Callable[[], dict[str, float]] | None,
        steps: int,
        seed: int,
    ) -> None:
        """Args:
        target: weights of the domains whose losses are to fall.
        unseen: measures those among them that are never trained on; None if there are none.
        steps: of the run.

        Raises:
            TrainingError: a round is too short for its sweeps.
        """
        super().__init__(domains)
        self._plan, self._target, self._unseen, self._seed = options, dict(target), unseen, seed
        self._round, self._sweeping = (
            steps // options.updates,
            options.sweeps * len(self.domains) * options.sweep_steps,
        )
        if self._round <= self._sweeping:
            raise TrainingError(
                f"{steps} steps in {options.updates} rounds leave {self._round} a round, and {options.sweeps} sweeps "
                f"of {options.sweep_steps} steps over {len(self.domains)} domains take {self._sweeping}; train on "
                "more tokens, or lower updates, sweeps or sweep_steps"
            )
        self._last: dict[str, float] = {}
        self._moved = False
        self._drops_TD = np.zeros((len(self._target), len(self.domains)))

    def validates(self, step: int) -> bool:
        number, offset = divmod(step, self._round)
        return number < self._plan.updates and offset <= self._sweeping and offset % self._plan.sweep_steps == 0

    def after_validation(self, step: int, losses: Mapping[str, float]) -> dict[str, float] | None:
        self._moved = self.validates(step)
        if not self._moved:
            return None
        if self._unseen:
            losses = {**losses, **self._unseen()}
        number, offset = divmod(step, self._round)
        order = [domain for sweep in range(self._plan.sweeps) for domain in self._order(number, sweep)]
        done = offset // self._plan.sweep_steps
        if done:
            drops_T = [self._last[domain] - losses[domain] for domain in self._target]
            self._drops_TD[:, self.domains.index(order[done - 1])] += drops_T
        self._last = {domain: losses[domain] for domain in self._target}
        if done < len(order):
            return rules.smoothed_one_hot(self.domains, on=order[done])
        effects_TD = rules.effects(self._drops_TD / self._plan.sweeps)
        self._drops_TD = np.zeros_like(self._drops_TD)
        moved = rules.aioli(self.weights, effects_TD=effects_TD, importance_T=[*self._target.values()])
        self.propose(moved, scores=dict(zip(self.domains, effects_TD.sum(0).tolist(), strict=True)))
        self.settle()
        return self.weights

    def record(self, kind: Kind) -> Mapping[str, Any]:
        if kind == "validation" and self._moved:
            return super().record("step")
        return super().record(kind) if kind == "run" else {}

    def state(self) -> dict[str, Any]:
        return super().state() | {"last": self._last, "drops": self._drops_TD.tolist()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        self._last, self._drops_TD = dict(saved["last"]), np.array(saved["drops"])

    def _order(self, number: int, sweep: int) -> list[str]:
        shuffled = np.random.default_rng([self._seed, number, sweep]).permutation(len(self.domains))
        return [self.domains[i] for i in shuffled]
