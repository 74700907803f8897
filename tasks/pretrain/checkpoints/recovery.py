"""Saving a run, resuming it, and going back to a checkpoint in the middle of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.pretrain.checkpoints import resume
from tasks.pretrain.checkpoints.manager import CheckpointManager
from tasks.pretrain.health.loss_guard import Rollback, Rollbacks
from tasks.pretrain.job import Job, TrainingError, code_version
from tasks.settings import Pretrain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tasks.corpus.sampling.sampler import Sampler
    from tasks.pretrain.checkpoints.run_state import RunState
    from tasks.pretrain.engine.interface import Engine
    from tasks.pretrain.health.loss_guard import LossGuard
    from tasks.pretrain.hook import Hook
    from tasks.pretrain.launch.process import Process
    from tasks.pretrain.log.run_log import RunLog


class Recovery:
    """Writes all parts of a run that have a state into checkpoints, and reads them back into the same objects."""

    def __init__(
        self,
        job: Job,
        *,
        engine: Engine,
        process: Process,
        run_log: RunLog,
        state: RunState,
        sampler: Sampler,
        guard: LossGuard,
        hooks: Sequence[Hook],
    ) -> None:
        self.params, self.engine, self.process, self.run_log = job.params, engine, process, run_log
        self.state, self.sampler, self.guard, self.hooks = state, sampler, guard, hooks
        self.checkpoints = CheckpointManager(
            job.workspace / "checkpoints", params=job.params, rank=process.rank, world_size=process.world_size
        )
        self._rollbacks = Rollbacks(job.workspace)
        self._code = code_version() if process.rank == 0 else ""

    def save(self) -> None:
        """Begin a checkpoint; see CheckpointManager.save."""
        state = {
            **self.state.to_json(),
            "code": self._code,
            "log": self.run_log.sync(),
            "sampler": self.sampler.state(),
            "hooks": {hook.name: hook.state() for hook in self.hooks},
        }
        self.checkpoints.save(self.engine, state=state)

    def kept(self) -> str:
        """What a run that stops now leaves, for a message."""
        saved = self.checkpoints.latest()
        return f"the checkpoint of step {saved['step']} under {self.checkpoints.folder}" if saved else "nothing yet"

    def resume(self, saved: dict[str, Any] | None) -> bool:
        """Begin where a checkpoint of an earlier start is, and say so; False without one.

        Raises:
            TrainingError: it cannot be loaded here, and why.
        """
        for note in self.checkpoints.notes:
            self.run_log.say(note)
        if saved is None:
            return False
        self._load(saved)
        for change in resume.changes(Pretrain(**saved["params"]), self.params):
            if change.shows:
                self.run_log.event(self.state.step, what="settings", message=f"from here on {change}")
        self.state.resumed_from = {"step": self.state.step, "code": saved["code"]}
        self.run_log.say(f"going on from the checkpoint of step {self.state.step}")
        if saved["code"] != self._code:
            self.run_log.say(
                f"that checkpoint was written by the code of {saved['code']}, and this is {self._code}: "
                "the run is not the one that either alone would give"
            )
        return True

    def roll_back(self, fault: str) -> None:
        """Go back to the last checkpoint, and on from there with what comes after the batches drawn so far.

        Args:
            fault: what was wrong with the step, for the log.
        """
        import torch

        failed = self.state.step
        self.checkpoints.finish()
        saved = self.checkpoints.latest()
        assert saved is not None, "one is written at step 0"
        self.sampler.set_weights(saved["weights"])
        rollback = Rollback(
            step=failed,
            to_step=saved["step"],
            message=f"{fault}: back to the checkpoint of step {saved['step']}, and on with the batches after it",
            sampler=self.sampler.state(),
            guard=self.guard.state(),
        )
        if self.process.rank == 0:
            self._rollbacks.add(saved, rollback)
        torch.distributed.barrier()
        self._load(saved)

    def _load(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint, and from where rollbacks to it have led since."""
        if missing := [hook.name for hook in self.hooks if hook.name not in saved.get("hooks", {})]:
            raise TrainingError(
                f"{self.checkpoints.folder}: the checkpoint of step {saved['step']} is of other code, which kept "
                f"nothing of {', '.join(missing)}; go on with that code, or start again with --discard"
            )
        self.checkpoints.restore(self.engine, saved)
        self.state.restore(saved)
        self.sampler.restore(saved["sampler"])
        for hook in self.hooks:
            hook.restore(saved["hooks"][hook.name])
        self.run_log.open(offset=saved["log"]["bytes"], step=self.state.step)
        rollbacks = self._rollbacks.after(saved)
        for rollback in rollbacks:  # the log was cut back to the checkpoint
            self.run_log.event(rollback.to_step, what="rollback", message=rollback.message, sampler=rollback.sampler)
        if rollbacks:
            self.sampler.restore(rollbacks[-1].sampler)
            self.guard.restore(rollbacks[-1].guard)
