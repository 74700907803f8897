"""Aioli in the loop: how the losses fall on mixes of mostly one domain says which to take (arXiv 2411.05735).

The steps are divided into rounds. A round begins with `sweeps` sweeps over all domains, each in an order of its own:
`sweep_steps` steps on the mix about a domain, and an evaluation. From how far each loss fell come the effects of the
single domains (rules.effects), which move the mix (rules.aioli), and the rest of the round is trained on that mix. The
steps that are left over go into the last round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.pretrain.domains import rules
from tasks.pretrain.domains.plan import Aioli
from tasks.pretrain.domains.weigher import Weigher
from tasks.pretrain.job import TrainingError
from tasks.pretrain.launch.process import Process
from tasks.pretrain.validation import Validation


class Sweeps(Weigher):
    """Weights by validation losses between sweeps."""

    def __init__(
        self,
        plan: Aioli,
        *,
        domains: Sequence[str],
        target: Mapping[str, float],
        unseen: Validation | None,
        steps: int,
        seed: int,
    ) -> None:
        """Args:
        target: weights of the domains whose losses are to fall.
        unseen: those among them that are never trained on, whose losses no evaluation gives.
        steps: of the run.

        Raises:
            TrainingError: a round is too short for its sweeps.
        """
        super().__init__(domains)
        self._plan, self._target, self._unseen, self._seed = plan, dict(target), unseen, seed
        self._round, self._sweeping = steps // plan.updates, plan.sweeps * len(self.domains) * plan.sweep_steps
        if self._round <= self._sweeping:
            raise TrainingError(
                f"{steps} steps in {plan.updates} rounds leave {self._round} a round, and {plan.sweeps} sweeps of "
                f"{plan.sweep_steps} steps over {len(self.domains)} domains take {self._sweeping}; train on more "
                "tokens, or lower updates, sweeps or sweep_steps"
            )
        self._last: dict[str, float] = {}
        self._drops_TD = np.zeros((len(self._target), len(self.domains)))

    def due(self, step: int) -> bool:
        """Whether the losses are needed after a step; 0 is before the first."""
        number, offset = divmod(step, self._round)
        return number < self._plan.updates and offset <= self._sweeping and offset % self._plan.sweep_steps == 0

    def measure(self, model: Any, *, batch: int, process: Process) -> dict[str, float]:
        """The losses of the target's domains that are never trained on; every rank calls it."""
        if self._unseen is None:
            return {}
        return self._unseen.evaluate(model, batch=batch, rank=process.rank, world_size=process.world_size)

    def move(self, losses: Mapping[str, float], *, step: int) -> dict[str, float]:
        """The mix from here on, after an evaluation that was `due`.

        Args:
            losses: of the target's domains, nats per token.
        """
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

    def state(self) -> dict[str, Any]:
        return super().state() | {"last": self._last, "drops": self._drops_TD.tolist()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        self._last, self._drops_TD = dict(saved["last"]), np.array(saved["drops"])

    def _order(self, number: int, sweep: int) -> list[str]:
        shuffled = np.random.default_rng([self._seed, number, sweep]).permutation(len(self.domains))
        return [self.domains[i] for i in shuffled]
