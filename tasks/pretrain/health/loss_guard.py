"""What a loss or a gradient that isn't finite, or a spike, leads to: stop, leave the batch out, or go back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tasks import scratch
from tasks.moe import untrusted
from tasks.pretrain.job import TrainingError
from tasks.settings.pretrain import Guard as Knobs

Verdict = Literal["sound", "skip", "rollback"]
FILE = "rollbacks.json"
DECAY = 0.98  # of the running mean: a step's loss still counts half after 34 sound steps
WARM = 10  # sound steps before a spike can be told from a noisy start
_NAMED = 8  # windows that a message names


class LossGuard:
    """Judges every step; the same on every rank if the losses and norms that it is given are.

    The running mean is m / (1 - DECAY^n) after n sound steps, m <- DECAY m + (1 - DECAY) loss from 0, which starts at
    the first loss (Adam's correction, arXiv 1412.6980, section 3). Before WARM sound steps nothing counts as a spike.

    Interventions count up until a sound step at or behind the furthest step that needed one: after a skip the next
    sound step, after a rollback the one with which the run is as far as it had been. So a run that fails again and
    again at one place comes to its limit, however many sound steps lie between it and the checkpoint; and every run
    ends, because after each reset the next failure is further on.
    """

    def __init__(self, knobs: Knobs, *, seq_len: int, models: Sequence[Path] = ()) -> None:
        """`models` are the checkpoints that the losses come from, to be looked at if the first step is not sound."""
        self.knobs, self.seq_len = knobs, seq_len
        self._models = models
        self._mean = 0.0
        self._sound = 0
        self._interventions = 0
        self._frontier = 0  # the last step that an intervention was needed at

    def judge(
        self,
        *,
        step: int,
        loss: float,
        norm: float | None,
        windows: Sequence[tuple[str, int]] = (),
        kept: Callable[[], str] = lambda: "nothing yet",
    ) -> Verdict:
        """Judge a step, before its optimizer step (norm None: then a sound verdict changes nothing here) and after.

        Args:
            step: the step's number, from 1.
            loss: mean over the global batch, nats per token.
            norm: of the whole gradient before clipping.
            windows: (domain, window) of those to look at, for the message.
            kept: says what a stop leaves, such as "the checkpoint of step 50 under …"; called only for a message.

        Raises:
            TrainingError: the policy is `stop`, or it's the limit-th intervention in a row and one more is needed.
        """
        what = self.fault(loss=loss, norm=norm)
        if what is None:
            if norm is not None:
                self._mean = DECAY * self._mean + (1 - DECAY) * loss
                self._sound += 1
                if step >= self._frontier:
                    self._interventions = 0
            return "sound"
        if self.knobs.policy == "stop" or self._interventions >= self.knobs.limit:
            raise TrainingError(self.message(what, step=step, windows=windows, kept=kept()))
        self._interventions += 1
        self._frontier = max(self._frontier, step)
        return self.knobs.policy

    def fault(self, *, loss: float, norm: float | None) -> str | None:
        """What is wrong with a step, such as "the loss is not finite"; the same before and after its judgement."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if norm is not None and not math.isfinite(norm):
            return "the gradient norm is not finite"
        spike, mean = self.knobs.spike, self.mean
        if spike is not None and mean is not None and self._sound >= WARM and loss > spike * mean:
            return f"the loss is {loss:.4g}, above {spike:g} (pretrain.guard.spike) times its running mean {mean:.4g},"
        return None

    @property
    def mean(self) -> float | None:
        """The running mean of the loss, None before the first sound step."""
        return self._mean / (1 - DECAY**self._sound) if self._sound else None

    def message(
        self, what: str, *, step: int, windows: Sequence[tuple[str, int]] = (), kept: str = "nothing yet"
    ) -> str:
        """The error that ends a run: what, at which step, in which windows, what is kept and what to try."""
        where = f" (windows of {self.seq_len} tokens: {named(windows)})" if windows else ""
        if step <= 1 and "not finite" in what:
            return f"{what} at step {step}{where}. {self._at_once()}"
        tries = ["a lower pretrain.learning_rate", "more warmup_tokens", "a lower clip", "precision: float32"]
        before = ""
        if self.knobs.policy == "stop":
            tries.append("guard.policy: skip or rollback, which leave such batches out")
        else:
            count, limit = self._interventions, self.knobs.limit
            before = f", and {count} of pretrain.guard.limit = {limit} {self.knobs.policy}s in a row are used up"
        return (
            f"{what} at step {step}{where}{before}. Kept: {kept}. Try {', '.join(tries)}; look at those windows if it "
            "comes back at the same step"
        )

    def _at_once(self) -> str:
        """Why a run may break before its first optimizer step, which no knob of that step can mend."""
        for model in self._models:
            if text := untrusted.not_finite(model):
                return f"{model}: {text}"
        return (
            "No weight has been changed yet, and those of the models are finite: try precision: float32, hold the "
            "split against its parent (moeforge verify), and look at those windows"
        )

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON values; floats survive JSON exactly."""
        return {
            "mean": self._mean,
            "sound": self._sound,
            "interventions": self._interventions,
            "frontier": self._frontier,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the guard that gave `state`."""
        self._mean, self._sound = state["mean"], state["sound"]
        self._interventions, self._frontier = state["interventions"], state["frontier"]


def named(windows: Sequence[tuple[str, int]]) -> str:
    """(domain, window) of some windows for a message, cut after the first few."""
    more = f" and {len(windows) - _NAMED} more" if len(windows) > _NAMED else ""
    return ", ".join(f"{domain} window {window}" for domain, window in windows[:_NAMED]) + more


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """One return to a checkpoint."""

    step: int
    """The step that wasn't sound."""
    to_step: int
    message: str
    """For the log, which is cut back to the checkpoint and has to say it again."""
    sampler: dict[str, Any]
    """The sampler's state from which training goes on: past every batch that was drawn before. The domain weights in
    it may have moved since the checkpoint, whose own hold again: set them after it is restored."""
    guard: dict[str, Any]
    """LossGuard.state() after the verdict: the checkpoint's own doesn't know of the interventions since."""


class Rollbacks:
    """The returns to checkpoints, in a file of the workspace; with it, kill -9 between a rollback and the next
    checkpoint ends in the same run.

    A checkpoint holds the sampler's state of its own moment; after a rollback to it training goes on from a later one.
    So a start reads the checkpoint, and then here what it went on with. A rollback writes here first and reloads then:
    a process killed between the two finds what it would have found after the reload. Killed before the file is
    written, it does the failing step again and comes to the same verdict.

    A checkpoint is known by its step and its sampler's step, which never goes back: after a return beyond a checkpoint
    the next one of that step number is another one, and what was written for the first isn't meant for it.
    """

    def __init__(self, workspace: Path) -> None:
        self._path = workspace / FILE

    def add(self, checkpoint: Mapping[str, Any], rollback: Rollback) -> None:
        """Write that training goes on from the checkpoint of this state with `rollback.sampler`. Rank 0 calls it, and
        no rank reloads before it has returned.

        Raises:
            OSError: the disk is full; the file is as it was.
        """
        key, drawn = _key(checkpoint), rollback.sampler["step"]
        # a run that starts from an older checkpoint, because the newest is damaged, comes through here again
        entries = [e for e in self._read() if e["checkpoint"] != key or e["sampler"]["step"] < drawn]
        scratch.write_sealed(self._path, {"rollbacks": [*entries, {"checkpoint": key, **asdict(rollback)}]})

    def after(self, checkpoint: Mapping[str, Any]) -> list[Rollback]:
        """The rollbacks to the checkpoint of this state, in order; the last one's `sampler` and `guard` hold."""
        found = [entry for entry in self._read() if entry.pop("checkpoint") == _key(checkpoint)]
        return [Rollback(**entry) for entry in found]

    def _read(self) -> list[dict[str, Any]]:
        """None if the file is missing or damaged: the run fails at the same step then, and comes to the same again."""
        try:
            found: list[dict[str, Any]] = scratch.read_sealed(self._path)["rollbacks"]
        except (FileNotFoundError, ValueError):
            return []
        return found


def _key(checkpoint: Mapping[str, Any]) -> list[int]:
    return [checkpoint["step"], checkpoint["sampler"]["step"]]
