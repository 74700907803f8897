"""The training loop."""

from __future__ import annotations

import functools
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import plugin
from tasks.corpus import manifest
from tasks.moe import counts
from tasks.pretrain import batches, schedule, step_result
from tasks.pretrain.checkpoints.recovery import Recovery
from tasks.pretrain.checkpoints.run_state import RunState
from tasks.pretrain.health.loss_guard import LossGuard, named
from tasks.pretrain.health.router_monitor import RouterMonitor
from tasks.pretrain.hook import Step
from tasks.pretrain.job import Diverged, Job, TrainingError
from tasks.pretrain.log.run_log import RunLog
from tasks.pretrain.log.stopwatch import Stopwatch
from tasks.pretrain.loss.balance import BalanceHook
from tasks.pretrain.validation import Validation

if TYPE_CHECKING:
    from tasks.pretrain.engine.interface import Engine
    from tasks.pretrain.health.loss_guard import Decision
    from tasks.pretrain.hook import Hook, Kind
    from tasks.pretrain.launch.process import Process
    from tasks.pretrain.loss.losses import Losses
    from tasks.pretrain.loss.objective import Objective
    from tasks.pretrain.step_result import StepResult


class Trainer:
    """One run from its first or its next step to its last. Every rank has one and makes the same calls in order."""

    def __init__(self, job: Job, *, engine: Engine, objective: Objective, process: Process) -> None:
        self.job, self.params = job, job.params
        self.engine, self.objective, self.process = engine, objective, process
        mixture = json.loads(job.mixture.read_text())
        corpus = manifest.load(job.corpus)
        if mixture["weights"].keys() != corpus.trained.keys():
            raise TrainingError(
                f"{job.mixture} has the domains {', '.join(sorted(mixture['weights']))}, and {job.corpus} has "
                f"{', '.join(sorted(corpus.trained))}; run the stages `corpus` and `mixture` again"
            )
        manifest.require_tokenizer(corpus, job.model)
        self.domains = list(corpus.trained)
        self.validation = Validation.load(job, mixture["evidence"])
        self.state = RunState(weights=mixture["weights"], windows_seen=dict.fromkeys(self.domains, 0))
        self.sampler, self.loader = batches.draw(
            job, self.state.weights, corpus_sha256=corpus.sha256, rank=process.rank, world_size=process.world_size
        )
        epoch_tokens = {domain: entry.train.tokens for domain, entry in corpus.trained.items()}
        self.run_log = RunLog(job, engine=engine, process=process, epoch_tokens=epoch_tokens)
        sizes = counts.experts(engine.module.config)
        self.top_k = sizes["top_k"]
        models = [job.model, job.parent] if self.params.distill else [job.model]
        self.guard = LossGuard(self.params.guard, seq_len=self.params.seq_len, models=models)
        self.hooks: list[Hook] = [
            *(hook for module in plugin.modules("hooks").values() for hook in module.hooks(self)),
            BalanceHook(objective.balancer),
            RouterMonitor(layers=sizes["layers"], experts=sizes["experts"], top_k=self.top_k, log=self.run_log),
            self.guard,
        ]
        self.recovery = Recovery(
            job,
            engine=engine,
            process=process,
            run_log=self.run_log,
            state=self.state,
            sampler=self.sampler,
            guard=self.guard,
            hooks=self.hooks,
        )

    def run(self) -> None:
        """Train to the last step, from the last checkpoint if there is one.

        Raises:
            TrainingError: the loss or the gradient is not finite and the guard stops, or a checkpoint cannot be
                written or resumed.
        """
        begun, params, state, checkpoints = time.perf_counter(), self.params, self.state, self.recovery.checkpoints
        latest = checkpoints.latest()
        with self.run_log:
            if not self.recovery.resume(latest):
                self.run_log.open(offset=0, step=0)
                state.load_before = self._validate()
                if params.guard.policy == "rollback":
                    self.recovery.save()  # something to go back to
            before = dict(state.seconds)
            while state.step < params.steps:
                if not self._train():
                    continue  # at the checkpoint that the guard went back to
                step, last = state.step, state.step == params.steps
                if last or step % params.eval_every == 0 or any(hook.validates(step) for hook in self.hooks):
                    load = self._validate()
                    state.load_after = load if last else state.load_after
                state.seconds["total"] = before["total"] + time.perf_counter() - begun
                state.seconds["saving"] = before["saving"] + checkpoints.blocked
                if last or step % params.save_every == 0 or step == schedule.stable(params):
                    self.recovery.save()
            checkpoints.finish()
            state.seconds["saving"] = before["saving"] + checkpoints.blocked

    def _train(self) -> bool:
        """Train on one batch. False if that was undone by going back to a checkpoint."""
        watch = Stopwatch("data", "forward", "backward", "optimizer")
        number = self.state.step = self.state.step + 1
        with watch("data"):
            rates = self.engine.set_rates(step=number, params=self.params)
            step = Step(number=number, batch=self.loader.next(), rate=max(rates.values()), top_k=self.top_k)
        with watch("forward"):
            for hook in self.hooks:
                hook.before_step(step)
        losses = self._forward_backward(step, watch)
        balancer = self.objective.balancer
        result = step_result.collect(
            step.batch,
            losses,
            names=self.objective.parts,
            domains=self.domains,
            load_LE=balancer.load_LE if balancer else np.zeros((0, 0), dtype=np.int64),
            seconds=watch.spent["forward"] + watch.spent["backward"],
            slots=self.params.batch,
            process=self.process,
        )
        with watch("optimizer"):
            decision, norm = self._update(result)
        self.recovery.checkpoints.check()
        if decision == "rollback":
            return False
        timing = {"seconds": watch.total(), **watch.spent}
        self.state.add(result, seconds=timing["seconds"])
        for hook in self.hooks:
            hook.after_step(step, result, sound=decision == "sound")
        if decision == "sound":
            more = self.records("step")
            what = self.params.phase(number)
            self.run_log.step(self.state, result, rates=rates, norm=norm, timing=timing, what=what, more=more)
        return True

    def _forward_backward(self, step: Step, watch: Stopwatch) -> list[Losses]:
        """Accumulate the gradients of a batch; the losses of its micro-batches."""
        with watch("backward"):
            for hook in self.hooks:
                if (losses := hook.backward(step)) is not None:
                    return losses
        losses = []
        for start in range(0, len(step.batch.input_ids), self.params.micro_batch):
            if start:
                self.engine.next_micro_batch()
            rows = slice(start, start + self.params.micro_batch)
            with watch("forward"):
                losses.append(self.objective(step.batch, rows=rows, device=self.process.device))
            with watch("backward"):
                self.engine.backward(losses[-1].total)
        return losses

    def _update(self, result: StepResult) -> tuple[Decision, float]:
        """Take the optimizer step if the loss is sound, or do what the guard says instead.

        Returns:
            The guard's decision, and the norm of the gradient; NaN if the loss was enough to give the step up.
        """
        step, loss, windows, norm = self.state.step, result.loss, result.suspects(), None
        decide = functools.partial(self.guard.decide, step=step, loss=loss, windows=windows, kept=self.recovery.kept)
        decision = decide(norm=None)
        if decision == "sound":
            norm = self.engine.finish_step()
            decision = decide(norm=norm)
        else:
            self.engine.discard_step()
        if decision != "sound":
            fault = f"{self.guard.fault(loss=loss, norm=norm)} at step {step} (windows: {named(windows)})"
            if decision == "skip":
                self.run_log.event(step, what="skip", message=f"{fault}: the batch is left out")
            else:
                self.recovery.roll_back(fault)
        return decision, float("nan") if norm is None else norm

    def _validate(self) -> list[list[int]]:
        """Log the validation losses, let hooks move the domain weights, return tokens per layer and expert."""
        begun, state = time.perf_counter(), self.state
        losses, load_LE = self.validation.measure(
            self.engine.module, batch=self.params.micro_batch, process=self.process
        )
        if not np.isfinite(list(losses.values())).all():
            what, kept = "the validation loss is not finite", self.recovery.kept()
            raise Diverged(self.guard.message(what, step=state.step, windows=[], kept=kept))
        for hook in self.hooks:
            if (weights := hook.after_validation(state.step, losses)) is not None:
                state.weights = weights
                self.sampler.set_weights(weights)
        self.run_log.validation(
            state,
            losses,
            references=self.validation.references,
            sampler=self.sampler.state(),
            load_LE=load_LE,
            seconds=time.perf_counter() - begun,
            more=self.records("validation"),
        )
        load: list[list[int]] = load_LE.tolist()
        return load

    def records(self, kind: Kind) -> dict[str, Any]:
        """What the hooks add to a record (`Hook.record`)."""
        return {name: value for hook in self.hooks for name, value in hook.record(kind).items()}
