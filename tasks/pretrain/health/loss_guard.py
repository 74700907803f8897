"""Reacts to a loss or gradient that is not finite and to loss spikes: stop, skip the batch, or roll back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tasks import scratch
from tasks.moe import untrusted
from tasks.pretrain.hook import Hook
from tasks.pretrain.job import Diverged
from tasks.settings.pretrain import Guard as Settings

Decision = Literal["sound", "skip", "rollback"]
FILE = "rollbacks.json"
DECAY = 0.98  # of the running mean: a half-life of 34 sound steps
WARM = 10  # sound steps before a loss can count as a spike: the start is noisy
_NAMED = 8  # windows that a message names


class LossGuard(Hook):
    """Decides on every step, from the losses and norms alone: all ranks come to the same decision.

    The running mean is m / (1 - DECAY^n) after n sound steps, m <- DECAY m + (1 - DECAY) loss from 0 (Adam's bias
    correction, arXiv 1412.6980, section 3). Before WARM sound steps nothing counts as a spike.

    The count of interventions is reset by a sound step at or after the furthest step that needed one. So a run that
    fails repeatedly at one step reaches its limit, however many sound steps lie between that step and the checkpoint;
    and every run ends, because after each reset the next failure is further on.
    """

    name = "loss_guard"

    def __init__(self, settings: Settings, *, seq_len: int, models: Sequence[Path] = ()) -> None:
        """`models`: the checkpoints to search for weights that are not finite if the first step fails."""
        self.settings, self.seq_len = settings, seq_len
        self._models = models
        self._mean = 0.0
        self._sound = 0
        self._interventions = 0
        self._frontier = 0  # the last step that an intervention was needed at

    def decide(
        self,
        *,
        step: int,
        loss: float,
        norm: float | None,
        windows: Sequence[tuple[str, int]] = (),
        kept: Callable[[], str] = lambda: "nothing yet",
    ) -> Decision:
        """Decide on a step, before its optimizer step with norm None, which changes no state if sound, and after it.

        Args:
            step: the step's number, from 1.
            loss: mean over the global batch, nats per token.
            norm: of the whole gradient before clipping.
            windows: (domain, window) of the suspects, for the message.
            kept: what a stop leaves, such as "the checkpoint of step 50 under …"; called only for a message.

        Raises:
            Diverged: the policy is `stop`, or `limit` interventions in a row are used up.
        """
        what = self.fault(loss=loss, norm=norm)
        if what is None:
            if norm is not None:
                self._mean = DECAY * self._mean + (1 - DECAY) * loss
                self._sound += 1
                if step >= self._frontier:
                    self._interventions = 0
            return "sound"
        if self.settings.policy == "stop" or self._interventions >= self.settings.limit:
            raise Diverged(self.message(what, step=step, windows=windows, kept=kept()))
        self._interventions += 1
        self._frontier = max(self._frontier, step)
        return self.settings.policy

    def fault(self, *, loss: float, norm: float | None) -> str | None:
        """Describe what is wrong with a step, such as "the loss is not finite"; None if nothing is."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if norm is not None and not math.isfinite(norm):
            return "the gradient norm is not finite"
        spike, mean = self.settings.spike, self.mean
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
        """The error that ends a run: what happened, at which step and windows, what is kept and what to try."""
        where = f" (windows of {self.seq_len} tokens: {named(windows)})" if windows else ""
        if step <= 1 and "not finite" in what:
            return f"{what} at step {step}{where}. {self._at_once()}"
        tries = ["a lower pretrain.learning_rate", "more warmup_tokens", "a lower clip", "precision: float32"]
        before = ""
        if self.settings.policy == "stop":
            tries.append("guard.policy: skip or rollback, which leave such batches out")
        else:
            count, limit = self._interventions, self.settings.limit
            before = f", and {count} of pretrain.guard.limit = {limit} {self.settings.policy}s in a row are used up"
        return (
            f"{what} at step {step}{where}{before}. Kept: {kept}. Try {', '.join(tries)}; look at those windows if it "
            "comes back at the same step"
        )

    def _at_once(self) -> str:
        """Why the first step may fail, before any setting of the optimizer had an effect."""
        for model in self._models:
            if text := untrusted.not_finite(model):
                return f"{model}: {text}"
        return (
            "No weight has been changed yet, and those of the models are finite: try precision: float32, hold the "
            "split against its parent (moeforge verify), and look at those windows"
        )

    def state(self) -> dict[str, Any]:
        """The guard's state as JSON values; floats survive JSON exactly."""
        return {
            "mean": self._mean,
            "sound": self._sound,
            "interventions": self._interventions,
            "frontier": self._frontier,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self._mean, self._sound = state["mean"], state["sound"]
        self._interventions, self._frontier = state["interventions"], state["frontier"]


def named(windows: Sequence[tuple[str, int]]) -> str:
    """List (domain, window) pairs for a message, cut after the first few."""
    more = f" and {len(windows) - _NAMED} more" if len(windows) > _NAMED else ""
    return ", ".join(f"{domain} window {window}" for domain, window in windows[:_NAMED]) + more


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """One return to a checkpoint."""

    step: int
    """The step that wasn't sound."""
    to_step: int
    message: str
    """For the log, which is cut back to the checkpoint and must get it again."""
    sampler: dict[str, Any]
    """The sampler's state to continue from, past every batch drawn before. The checkpoint's domain weights hold again:
    set them after restoring it."""
    guard: dict[str, Any]
    """LossGuard.state() after the decision, with the interventions since the checkpoint."""


class Rollbacks:
    """The rollbacks of a run, in a file of its workspace, so that a run killed after one continues as it would have.

    After a rollback the sampler is ahead of the checkpoint's own sampler state, so a resume reads the checkpoint and
    then its rollbacks here. A rollback is written before the checkpoint is reloaded. A run killed before the write
    repeats the failing step and comes to the same decision.

    An entry names its checkpoint by step and sampler step. The sampler's step never goes back, so a later checkpoint
    with the same step number is not taken for it.
    """

    def __init__(self, workspace: Path) -> None:
        self._path = workspace / FILE

    def add(self, checkpoint: Mapping[str, Any], rollback: Rollback) -> None:
        """Write a rollback to the checkpoint of this state. Rank 0 calls it, and no rank reloads before it returned.

        Raises:
            OSError: the disk is full; the file is as it was.
        """
        key, drawn = _key(checkpoint), rollback.sampler["step"]
        # a run that resumes from an older checkpoint, because the newest is damaged, gets here again
        entries = [e for e in self._read() if e["checkpoint"] != key or e["sampler"]["step"] < drawn]
        scratch.write_sealed(self._path, {"rollbacks": [*entries, {"checkpoint": key, **asdict(rollback)}]})

    def after(self, checkpoint: Mapping[str, Any]) -> list[Rollback]:
        """The rollbacks to the checkpoint of this state, in order; the last one's `sampler` and `guard` hold."""
        entries = [entry for entry in self._read() if entry.pop("checkpoint") == _key(checkpoint)]
        return [Rollback(**entry) for entry in entries]

    def _read(self) -> list[dict[str, Any]]:
        """[] if the file is missing or damaged: the run then fails at the same step and rolls back again."""
        try:
            return list(scratch.read_sealed(self._path)["rollbacks"])
        except (FileNotFoundError, ValueError):
            return []


def _key(checkpoint: Mapping[str, Any]) -> list[int]:
    return [checkpoint["step"], checkpoint["sampler"]["step"]]
