"""Reports dead experts, collapsed routers and slow ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tasks.pretrain.hook import Hook

if TYPE_CHECKING:
    from tasks.pretrain.hook import Step
    from tasks.pretrain.log.run_log import RunLog
    from tasks.pretrain.step_result import StepResult

TOKENS = 200  # an expert is dead if it got none where an even router would have sent it this many
STEPS = 10  # in at least this many steps; a router is reported when it is collapsed this many steps in a row
EVENNESS = 0.5


@dataclass(frozen=True, kw_only=True)
class Event:
    """An expert or a router that needs attention."""

    what: Literal["dead_experts", "router_collapse"]
    layer: int
    """Its number in the model."""
    experts: tuple[int, ...]
    """The dead ones, or those that hold the load."""
    message: str


class RouterMonitor(Hook):
    """Checks the load of every sparse layer in every step.

    Dead: no token in STEPS steps or more, in which an even router would have sent TOKENS or more. Under a router that
    chooses K of E experts evenly and independently for each token, the probability of that is (1 - K/E)^T with
    T >= TOKENS E / K, so below exp(-TOKENS) = 1e-87 for an expert and a window; an expert with a twentieth of the even
    share would still be called dead wrongly in 5e-5 of them. STEPS is needed because the tokens of few windows are not
    independent.

    Collapse, in STEPS steps in a row, of a layer with K < E: with load shares p over the experts, either
    - evenness (H(p) - ln K) / (ln E - ln K) < EVENNESS. No expert can have more than 1/K of the load, so H(p) >= ln K,
      where all tokens go to the same K; for K = 1 this is the entropy over ln E. Or
    - the K busiest experts hold more than half of what is possible, the middle between the even K / E and all.

    Both are reported once, and again only after they were gone. The events follow from the loads alone: all ranks, and
    a resumed run, report the same.
    """

    name = "router_monitor"

    def __init__(self, *, layers: Sequence[int], experts: int, top_k: int, log: RunLog | None = None) -> None:
        """`log`: gets the events of `after_step`."""
        self.layers, self.experts, self.top_k = list(layers), experts, top_k
        self._usual, self._log = top_k, log
        shape = (len(self.layers), experts)
        self._silent_LE = np.zeros(shape, dtype=np.int64)  # assignments in the layer since the expert's last token
        self._steps_LE = np.zeros(shape, dtype=np.int64)
        self._collapsed_L = np.zeros(len(self.layers), dtype=np.int64)  # steps in a row

    def after_step(self, step: Step, result: StepResult, *, sound: bool) -> None:
        if not (sound and result.load_LE.size):
            return
        for event in self.check(result.load_LE, step=step.number, top_k=step.top_k):
            if self._log:
                details = {"layer": event.layer, "experts": list(event.experts)}
                self._log.event(step.number, what=event.what, message=event.message, **details)

    def check(self, load_LE: np.ndarray, *, step: int, top_k: int | None = None) -> list[Event]:
        """Check a step.

        Args:
            load_LE: tokens per sparse layer and expert of the whole global batch, int [L, E].
            step: its number, for the messages.
            top_k: K of this step; the usual one if None.
        """
        self.top_k = top_k or self._usual
        if load_LE.shape != self._silent_LE.shape:
            raise ValueError(f"load has the shape {load_LE.shape}; needed: {self._silent_LE.shape}")
        return [*self._dead(load_LE, step), *self._collapse(load_LE, step)]

    def state(self) -> dict[str, Any]:
        """The monitor's state as JSON values."""
        return {
            "silent": self._silent_LE.tolist(),
            "steps": self._steps_LE.tolist(),
            "collapsed": self._collapsed_L.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        shape = self._silent_LE.shape
        self._silent_LE = np.array(state["silent"], dtype=np.int64).reshape(shape)
        self._steps_LE = np.array(state["steps"], dtype=np.int64).reshape(shape)
        self._collapsed_L = np.array(state["collapsed"], dtype=np.int64)

    def _dead(self, load_LE: np.ndarray, step: int) -> list[Event]:
        before_LE = self._is_dead()
        silent_LE = load_LE == 0
        self._silent_LE = np.where(silent_LE, self._silent_LE + load_LE.sum(1, keepdims=True), 0)
        self._steps_LE = np.where(silent_LE, self._steps_LE + 1, 0)
        new_LE = self._is_dead() & ~before_LE
        events = []
        for row in np.flatnonzero(new_LE.any(1)).tolist():
            dead = np.flatnonzero(new_LE[row])
            even = int(self._silent_LE[row, dead].min()) // self.experts
            names = f"expert{'s' * (len(dead) > 1)} {_listed(dead)}"
            steps = int(self._steps_LE[row, dead].min())
            message = (
                f"layer {self.layers[row]}: {names} had no token in {steps} steps, up to {step}, in which an even "
                f"router would have sent {even:,} to each; raise pretrain.balance.coefficient, or use the loss `bias`"
            )
            events.append(self._event("dead_experts", row, dead, message))
        return events

    def _is_dead(self) -> np.ndarray:
        return (self._silent_LE >= TOKENS * self.experts) & (self._steps_LE >= STEPS)

    def _collapse(self, load_LE: np.ndarray, step: int) -> list[Event]:
        events: list[Event] = []
        if self.top_k >= self.experts:
            return events
        for row, load_E in enumerate(load_LE):
            if not load_E.sum():
                continue
            share_E = load_E / load_E.sum()
            busiest = np.argsort(-load_E, kind="stable")[: self.top_k]
            held = float(share_E[busiest].sum())
            if evenness(load_E, top_k=self.top_k) >= EVENNESS and held <= (1 + self.top_k / self.experts) / 2:
                self._collapsed_L[row] = 0
                continue
            self._collapsed_L[row] += 1
            if self._collapsed_L[row] == STEPS:
                message = (
                    f"layer {self.layers[row]}: its router has collapsed for {STEPS} steps, up to {step}: the "
                    f"{self.top_k} busiest of {self.experts} experts ({_listed(busiest)}) hold {held:.0%} of the "
                    f"load, and an even router would give them {self.top_k / self.experts:.0%}; raise "
                    "pretrain.balance.coefficient or lower learning_rates.router"
                )
                events.append(self._event("router_collapse", row, busiest, message))
        return events

    def _event(
        self, what: Literal["dead_experts", "router_collapse"], row: int, experts: np.ndarray, message: str
    ) -> Event:
        return Event(what=what, layer=self.layers[row], experts=tuple(sorted(experts.tolist())), message=message)


def evenness(load_E: np.ndarray, *, top_k: int) -> float:
    """(H(p) - ln K) / (ln E - ln K) of a load, K < E: 0 if all tokens go to the same K experts, 1 if evenly to all."""
    share = load_E[load_E > 0] / load_E.sum()
    least, most = np.log(top_k), np.log(len(load_E))
    return float((-(share * np.log(share)).sum() - least) / (most - least))


def _listed(numbers: np.ndarray, most: int = 12) -> str:
    """`1, 4, 7`, cut after `most`."""
    ordered = sorted(numbers.tolist())
    return ", ".join(map(str, ordered[:most])) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
