"""The hook of dynamic batch loading: what each domain's loss is compared with, and how its weight moves."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tasks.plugins.dynamic import rule as rules
from tasks.plugins.dynamic.settings import Dynamic, Fit
from tasks.pretrain.hook import Hook, Kind
from tasks.pretrain.job import Job, TrainingError
from tasks.pretrain.validation import Validation
from tasks.settings.fields import LARGEST

if TYPE_CHECKING:
    from tasks.pretrain.log.run_log import RunLog
    from tasks.pretrain.loop import Trainer

_START = (406.4, 0.336, 0.69)  # a, b, c; where Sheared-LLaMA's notebook starts
_EVALUATIONS = 20_000


def hooks(trainer: Trainer) -> list[Hook]:
    """The reweighter, with `pretrain.dynamic`."""
    reweighter = Reweighter.load(
        trainer.job, validation=trainer.validation, start=trainer.state.weights, log=trainer.run_log
    )
    return [reweighter] if reweighter else []


class Reweighter(Hook):
    """Moves the domain weights at validations.

    Every rank has one and comes to the same weights, because the validation losses are the same on all.
    """

    name = "dynamic"

    def __init__(
        self,
        references: Mapping[str, float],
        *,
        rule: rules.Rule,
        start: Mapping[str, float],
        within: float,
        smoothing: float = 0.0,
        course: Mapping[int, Mapping[str, float]] | None = None,
        steps: int = LARGEST,
        log: RunLog | None = None,
    ) -> None:
        """Args:
        course: the weights after the validation of each step, to follow instead.
        steps: of the run; the validation after the last one moves nothing.
        """
        self.references, self.rule, self.course = dict(references), rule, course
        self._steps, self._log = steps, log
        self.start, self.within, self.smoothing = dict(start), within, smoothing
        self.weights = dict(start)

    @classmethod
    def load(
        cls, job: Job, *, validation: Validation, start: Mapping[str, float], log: RunLog | None = None
    ) -> Reweighter | None:
        """The reweighter of a job whose mixture is `start`; None without `pretrain.dynamic`.

        Raises:
            TrainingError: the references miss a domain of the corpus, name one that it lacks, or can't be predicted.
        """
        dynamic: Dynamic | None = vars(job.params)["dynamic"]
        if dynamic is None:
            return None
        chosen = dynamic.references
        if isinstance(chosen, Fit):
            _same_domains("pretrain.dynamic.references.losses", chosen.losses, validation.windows)
            size = chosen.size or _active(job)
            references = {
                domain: predict(losses, sizes=chosen.sizes, size=size, domain=domain)
                for domain, losses in chosen.losses.items()
            }
        elif chosen == "parent":
            if validation.references is None:
                raise TrainingError(_unmeasured(job))
            references = validation.references
        else:
            _same_domains("pretrain.dynamic.references", chosen, validation.windows)
            references = chosen
        course = job.options.get("weights")
        return cls(
            {domain: references[domain] for domain in validation.windows},
            rule=dynamic.rule,
            start=start,
            within=dynamic.within,
            smoothing=dynamic.smoothing,
            course=course and {int(step): weights for step, weights in course.items()},
            steps=job.params.steps,
            log=log,
        )

    def after_validation(self, step: int, losses: Mapping[str, float]) -> dict[str, float] | None:
        if step == self._steps:
            return None
        self.weights = self.update(self.weights, losses=losses, step=step)
        for message in self.at_cap(self.weights, losses=losses):
            if self._log:
                self._log.event(step, what="domain_at_cap", message=message)
        return self.weights

    def record(self, kind: Kind) -> Mapping[str, Any]:
        return {"references": self.references} if kind == "validation" else {}

    def state(self) -> dict[str, float]:
        return self.weights

    def restore(self, state: dict[str, float]) -> None:
        self.weights = dict(state)

    def update(self, weights: Mapping[str, float], *, losses: Mapping[str, float], step: int) -> dict[str, float]:
        """The weights after the evaluation of a step (`update`, smoothed, then `within`).

        Args:
            weights: those in use.
            losses: validation losses of this evaluation, nats per token.
        """
        if self.course is not None:
            return dict(self.course[step])
        moved = rules.update(weights, losses=losses, references=self.references, rule=self.rule)
        old = self.smoothing
        moved = {domain: (1 - old) * weight + old * weights[domain] for domain, weight in moved.items()}
        return rules.within(moved, start=self.start, factor=self.within)

    def at_cap(self, weights: Mapping[str, float], *, losses: Mapping[str, float]) -> list[str]:
        """A message for each domain that has all the weight it may have and is still above its reference."""
        return [
            f"{domain} has {self.within:g} times its weight at the start, the most it may have, and its loss of "
            f"{losses[domain]:.4f} is above the reference of {self.references[domain]:.4f}; that may be out of reach: "
            "give another reference (pretrain.dynamic.references), or train without dynamic"
            for domain, share in self.start.items()
            if share > 0
            and self.within > 1
            and weights[domain] >= share * self.within * (1 - 1e-9)
            and losses[domain] > self.references[domain]
        ]


def predict(losses: Iterable[float], *, sizes: Iterable[int], size: int, domain: str) -> float:
    """A family's loss at a size that it lacks: f(N) = a / N^b + c by least squares (Sheared-LLaMA, section 2.2, and
    scaling_law/reference_loss_estimation.ipynb of princeton-nlp/LLM-Shearing).

    It goes exactly through three losses that fall, and c, the loss of an infinitely large model, may come out below 0:
    use it between the sizes and for smaller ones, but not for far larger ones.

    Args:
        losses: nats per token at `sizes`.
        sizes: parameters, three or more.
        size: parameters to predict for.
        domain: its name, for errors.

    Raises:
        TrainingError: the fit doesn't converge, or predicts no positive loss.
    """
    import numpy as np
    from scipy.optimize import OptimizeWarning, curve_fit

    def f(n: Any, a: float, b: float, c: float) -> Any:
        return a / n**b + c

    where = f"pretrain.dynamic.references: the fit of {domain}'s losses {[*losses]} at {[*sizes]} parameters"
    remedy = "give references by domain, or `parent`, or losses of other sizes"
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", OptimizeWarning)  # three points leave no covariance
            fit, _ = curve_fit(f, np.array([*sizes], float), np.array([*losses]), p0=_START, maxfev=_EVALUATIONS)
            value = float(f(float(size), *fit))
    except RuntimeError as error:
        raise TrainingError(f"{where} doesn't converge; {remedy}") from error
    if not (math.isfinite(value) and value > 0):
        raise TrainingError(f"{where} predicts {value:.4g} for {size} parameters, which is no loss; {remedy}")
    return value


def _active(job: Job) -> int:
    from tasks.moe import counts

    return counts.parameters(json.loads((job.model / "config.json").read_text()))["active"]


def _same_domains(field: str, given: Mapping[str, Any], domains: Iterable[str]) -> None:
    missing, unknown = sorted(set(domains) - given.keys()), sorted(given.keys() - set(domains))
    faults = [f"nothing for {', '.join(missing)}"] if missing else []
    faults += [f"{', '.join(unknown)} not in the corpus"] if unknown else []
    if faults:
        raise TrainingError(
            f"{field}: {'; '.join(faults)}; it needs a reference loss for exactly {', '.join(domains)}"
        )


def _unmeasured(job: Job) -> str:
    evidence = json.loads(job.mixture.read_text())["evidence"]
    if not evidence.get("window_losses"):
        return (
            f"pretrain.dynamic.references: parent needs the parent's losses, and {job.mixture} has none; run the "
            "stage `mixture` with mixture.method: reference_loss, or give the references"
        )
    return (
        f"pretrain.eval_windows = {job.params.eval_windows} is more than the {evidence['windows']} windows of "
        "mixture.windows that have a reference loss; lower the first or raise the second"
    )
