"""The training loop."""

from __future__ import annotations

import functools
import json
import time
from typing import TYPE_CHECKING

import numpy as np

from tasks.pretrain import batches, elastic, schedule, step_result
from tasks.pretrain.checkpoints.recovery import Recovery
from tasks.pretrain.checkpoints.run_state import RunState
from tasks.pretrain.domains import estimators
from tasks.pretrain.domains.alignment import Alignment
from tasks.pretrain.domains.excess import Excess
from tasks.pretrain.domains.sweeps import Sweeps
from tasks.pretrain.dynamic import Reweighter
from tasks.pretrain.health.loss_guard import LossGuard, named
from tasks.pretrain.health.router_monitor import RouterMonitor
from tasks.pretrain.job import Diverged, Job, TrainingError
from tasks.pretrain.log.run_log import RunLog
from tasks.pretrain.log.stopwatch import Stopwatch
from tasks.pretrain.validation import Validation

if TYPE_CHECKING:
    from tasks.corpus.sampling.loader import Batch
    from tasks.pretrain.engine.interface import Engine
    from tasks.pretrain.health.loss_guard import Verdict
    from tasks.pretrain.launch.process import Process
    from tasks.pretrain.loss.objective import Losses, Objective
    from tasks.pretrain.step_result import StepResult


class Trainer:
    """One run from its first or its next step to its last. Every rank has one and makes the same calls in order."""

    def __init__(self, job: Job, *, engine: Engine, objective: Objective, process: Process) -> None:
        from tasks.corpus import manifest
        from tasks.moe import counts

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
        self.reweighter = Reweighter.load(job, validation=self.validation, start=mixture["weights"])
        self.state = RunState(weights=mixture["weights"], windows_seen=dict.fromkeys(self.domains, 0))
        self.sampler, self.loader = batches.draw(
            job, self.state.weights, corpus_sha256=corpus.sha256, rank=process.rank, world_size=process.world_size
        )
        sizes = counts.experts(engine.module.config)
        self.load_shape = (len(sizes["layers"]), sizes["experts"])
        models = [job.model, job.parent] if self.params.distill else [job.model]
        self.guard = LossGuard(self.params.guard, seq_len=self.params.seq_len, models=models)
        self.monitor = RouterMonitor(layers=sizes["layers"], experts=sizes["experts"], top_k=sizes["top_k"])
        self.dial = elastic.Dial(engine.module, seed=self.params.seed)
        epoch_tokens = {domain: entry.train.tokens for domain, entry in corpus.trained.items()}
        shares = self.sampler.weights
        self.weigher = estimators.load(job, shares=shares, engine=engine, objective=objective, process=process)
        if isinstance(self.weigher, Excess):
            objective.factors = self.weigher.factors
        self.run_log = RunLog(job, engine=engine, process=process, epoch_tokens=epoch_tokens)
        self.recovery = Recovery(
            job,
            engine=engine,
            process=process,
            run_log=self.run_log,
            state=self.state,
            sampler=self.sampler,
            guard=self.guard,
            monitor=self.monitor,
            weigher=self.weigher,
        )

    def run(self) -> None:
        """Train to the last step, from the last checkpoint if there is one.

        Raises:
            TrainingError: the loss or the gradient is not finite and the guard stops, or a checkpoint cannot be
                written or resumed.
        """
        begun = time.perf_counter()
        resumed = self.recovery.checkpoints.latest()
        with self.run_log:
            if not self.recovery.resume(resumed):
                self._start()
            before = dict(self.state.seconds)
            while self.state.step < self.params.steps:
                if not self._step():
                    continue
                self._evaluate_if_due()
                self.state.seconds["total"] = before["total"] + time.perf_counter() - begun
                self.state.seconds["saving"] = before["saving"] + self.recovery.checkpoints.blocked
                self._save_if_due()
            self.recovery.checkpoints.finish()
            self.state.seconds["saving"] = before["saving"] + self.recovery.checkpoints.blocked

    def _start(self) -> None:
        self.run_log.open(offset=0, step=0)
        self.state.load_before = self._evaluate()
        if self.params.guard.policy == "rollback":
            self.recovery.save()  # something to go back to

    def _step(self) -> bool:
        """Train on one batch. False if that was undone by going back to a checkpoint."""
        watch = Stopwatch("data", "forward", "backward", "optimizer")
        step = self.state.step = self.state.step + 1
        with watch("data"):
            rates = self.engine.set_rates(step=step, params=self.params)
            top_k = self.dial.turn(step)
            batch = self.loader.next()
        losses = self._forward_backward(batch, watch, top_k=top_k, rate=max(rates.values()))
        result = self._collect(batch, losses, seconds=watch.spent["forward"] + watch.spent["backward"])
        with watch("optimizer"):
            verdict, norm = self._update(result)
        self.recovery.checkpoints.check()
        if verdict == "rollback":
            return False
        timing = {"seconds": watch.total(), **watch.spent}
        self.state.add(result, seconds=timing["seconds"])
        if self.weigher:
            self.weigher.settle(taken=verdict == "sound")
            self.state.estimate = self.weigher.state()
        if verdict == "sound":
            what, drawn = self.params.phase(step), top_k if self.dial.values else None
            estimate = None if self.weigher is None or isinstance(self.weigher, Sweeps) else self.weigher.record()
            self.run_log.step(
                self.state, result, rates=rates, norm=norm, timing=timing, what=what, top_k=drawn, estimate=estimate
            )
            for event in self.monitor.check(result.load_LE, step=step, top_k=top_k) if result.load_LE.size else ():
                self.run_log.event(
                    step, what=event.what, message=event.message, layer=event.layer, experts=list(event.experts)
                )
        return True

    def _forward_backward(self, batch: Batch, watch: Stopwatch, *, top_k: int, rate: float) -> list[Losses]:
        """Accumulate the gradients of a batch; the losses of its micro-batches."""
        if self.objective.balancer:
            self.objective.balancer.begin(top_k=top_k)
        if self.objective.masks:
            self.objective.masks.begin(self.state.step)
        if isinstance(self.weigher, Alignment):
            with watch("backward"):
                return self.weigher.backward(batch, step=self.state.step, rate=rate)
        if isinstance(self.weigher, Excess):
            with watch("forward"):
                self.weigher.begin(batch, self.engine.module)
        losses = []
        for start in range(0, len(batch.input_ids), self.params.micro_batch):
            if start:
                self.engine.next_micro_batch()
            with watch("forward"):
                rows = slice(start, start + self.params.micro_batch)
                losses.append(self.objective(batch, rows=rows, device=self.process.device))
            with watch("backward"):
                self.engine.backward(losses[-1].total)
        return losses

    def _collect(self, batch: Batch, losses: list[Losses], *, seconds: float) -> StepResult:
        balancer = self.objective.balancer
        return step_result.collect(
            batch,
            losses,
            names=self.objective.parts,
            domains=self.domains,
            load_LE=balancer.load_LE if balancer else np.zeros(self.load_shape, dtype=np.int64),
            seconds=seconds,
            slots=self.params.batch,
            process=self.process,
        )

    def _update(self, result: StepResult) -> tuple[Verdict, float]:
        """Take the optimizer step if the loss is sound, or what the guard says instead.

        Returns:
            The verdict, and the norm of the gradient; NaN if the loss was enough to give the step up.
        """
        step, loss, windows = self.state.step, result.loss, result.suspects()
        judge = functools.partial(self.guard.judge, step=step, loss=loss, windows=windows, kept=self.recovery.kept)
        norm = None
        verdict = judge(norm=None)
        if verdict == "sound":
            norm = self.engine.finish_step()
            verdict = judge(norm=norm)
        else:
            self.engine.discard_step()
        if verdict == "sound":
            if self.objective.balancer:
                self.objective.balancer.end()
        else:
            fault = f"{self.guard.fault(loss=loss, norm=norm)} at step {step} (windows: {named(windows)})"
            if verdict == "skip":
                self.run_log.event(step, what="skip", message=f"{fault}: the batch is left out")
            else:
                self.recovery.roll_back(fault)
        return verdict, float("nan") if norm is None else norm

    def _evaluate_if_due(self) -> None:
        if self.state.step == self.params.steps:
            self.state.load_after = self._evaluate()
        elif self.state.step % self.params.eval_every == 0 or self._swept():
            self._evaluate()

    def _swept(self) -> bool:
        return isinstance(self.weigher, Sweeps) and self.weigher.due(self.state.step)

    def _evaluate(self) -> list[list[int]]:
        """Log the validation losses, move dynamic domain weights, return tokens per layer and expert."""
        begun, state = time.perf_counter(), self.state
        self.dial.reset()
        losses, load_LE = self.validation.measure(
            self.engine.module, batch=self.params.micro_batch, process=self.process
        )
        if not np.isfinite(list(losses.values())).all():
            what, kept = "the validation loss is not finite", self.recovery.kept()
            raise Diverged(self.guard.message(what, step=state.step, windows=[], kept=kept))
        if self.reweighter and state.step < self.params.steps:  # the same on every rank, because the losses are
            state.weights = self.reweighter.update(state.weights, losses=losses, step=state.step)
            self.sampler.set_weights(state.weights)
            for message in self.reweighter.at_cap(state.weights, losses=losses):
                self.run_log.event(state.step, what="domain_at_cap", message=message)
        swept = self.weigher if isinstance(self.weigher, Sweeps) and self._swept() else None
        if swept:
            unseen = swept.measure(self.engine.module, batch=self.params.micro_batch, process=self.process)
            state.weights = swept.move(losses | unseen, step=state.step)
            state.estimate = swept.state()
            self.sampler.set_weights(state.weights)
        self.run_log.validation(
            state,
            losses,
            references=self.reweighter.references if self.reweighter else self.validation.references,
            sampler=self.sampler.state(),
            load_LE=load_LE,
            seconds=time.perf_counter() - begun,
            estimate=swept.record() if swept else None,
        )
        load: list[list[int]] = load_LE.tolist()
        return load

    def _save_if_due(self) -> None:
        step, params = self.state.step, self.params
        if step == params.steps or step % params.save_every == 0 or step == schedule.stable(params):
            self.recovery.save()
