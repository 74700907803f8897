"""The training loop."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.pretrain import batches, schedule, step_result, trainable
from tasks.pretrain.checkpoints import resume
from tasks.pretrain.checkpoints.manager import CheckpointManager
from tasks.pretrain.checkpoints.run_state import State
from tasks.pretrain.dynamic import Reweighter
from tasks.pretrain.engine import interface as engines
from tasks.pretrain.health.loss_guard import LossGuard, Rollback, Rollbacks, named
from tasks.pretrain.health.router_monitor import RouterMonitor
from tasks.pretrain.job import Job, TrainingError, code_version
from tasks.pretrain.log.run_log import RunLog
from tasks.pretrain.validation import Validation
from tasks.settings import Pretrain

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from tasks.corpus.sampling.loader import Batch
    from tasks.pretrain.launch.process import Process
    from tasks.pretrain.loss.objective import Objective
    from tasks.pretrain.step_result import StepResult


class Trainer:
    """One run from its first or its next step to its last. Every rank has one and makes the same calls in order."""

    def __init__(self, job: Job, *, engine: DeepSpeedEngine, objective: Objective, process: Process) -> None:
        from tasks.corpus import manifest
        from tasks.moe import counts

        self.job, self.params = job, job.params
        self.engine, self.objective, self.process = engine, objective, process
        mixture = json.loads(job.mixture.read_text())
        corpus = manifest.load(job.corpus)
        if mixture["weights"].keys() != corpus.domains.keys():
            raise TrainingError(
                f"{job.mixture} has the domains {', '.join(sorted(mixture['weights']))}, and {job.corpus} has "
                f"{', '.join(sorted(corpus.domains))}; run the stages `corpus` and `mixture` again"
            )
        manifest.require_tokenizer(corpus, job.model)
        self.domains = list(corpus.domains)
        self.validation = Validation.load(job, mixture["evidence"])
        self.reweighter = Reweighter.load(job, validation=self.validation)
        self.state = State(weights=mixture["weights"], windows_seen=dict.fromkeys(self.domains, 0))
        self.sampler, self.loader = batches.draw(
            job, self.state.weights, corpus_sha256=corpus.sha256, rank=process.rank, world_size=process.world_size
        )
        sizes = counts.experts(engine.module.config)
        self.load_shape = (len(sizes["layers"]), sizes["experts"])
        models = [job.model, job.parent] if self.params.distill else [job.model]
        self.guard = LossGuard(self.params.guard, seq_len=self.params.seq_len, models=models)
        self.monitor = RouterMonitor(layers=sizes["layers"], experts=sizes["experts"], top_k=sizes["top_k"])
        self.checkpoints = CheckpointManager(
            job.workspace / "checkpoints", params=self.params, rank=process.rank, world_size=process.world_size
        )
        self.rollbacks = Rollbacks(job.workspace)
        epoch_tokens = {domain: entry.train.tokens for domain, entry in corpus.domains.items()}
        self.run_log = RunLog(job, engine=engine, process=process, epoch_tokens=epoch_tokens)
        self._code = code_version() if process.rank == 0 else ""

    def run(self) -> None:
        """Train to the last step, from the last checkpoint if there is one.

        Raises:
            TrainingError: the loss or the gradient is not finite and the guard stops, or a checkpoint cannot be
                written or resumed.
        """
        begun, params = time.perf_counter(), self.params
        saved = self.checkpoints.latest()
        with self.run_log:
            for note in self.checkpoints.notes:
                self.run_log.say(note)
            if saved:
                self._take_up(saved, first=True)
            else:
                self.run_log.open(offset=0, step=0)
                self.state.load_before = self._evaluate()
                if params.guard.policy == "rollback":
                    self._save()  # something to go back to
            before = dict(self.state.seconds)
            while self.state.step < params.steps:
                if not self._train_step():
                    continue
                step = self.state.step
                last = step == params.steps
                if last:
                    self.state.load_after = self._evaluate()
                elif step % params.eval_every == 0:
                    self._evaluate()
                self.state.seconds["total"] = before["total"] + time.perf_counter() - begun
                self.state.seconds["saving"] = before["saving"] + self.checkpoints.blocked
                if last or step % params.save_every == 0 or step == schedule.stable(params):
                    self._save()
            self.checkpoints.finish()
            self.state.seconds["saving"] = before["saving"] + self.checkpoints.blocked

    def _train_step(self) -> bool:
        """Train on one batch. False if that was undone by going back to a checkpoint."""
        begun = time.perf_counter()
        spent = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)
        params, engine, objective = self.params, self.engine, self.objective
        step = self.state.step = self.state.step + 1
        what = next(what for end, what in params.phases if step <= end)
        rates = trainable.set_rates(engine, step=step, params=params)
        batch = self.loader.next()
        spent["data"] = time.perf_counter() - begun
        if objective.balancer:
            objective.balancer.begin()
        losses = []
        for start in range(0, len(batch.input_ids), params.micro_batch):
            mark = time.perf_counter()
            rows = slice(start, start + params.micro_batch)
            passed = objective(batch, rows=rows, device=self.process.device)
            losses.append(passed)
            forward = time.perf_counter()
            engine.backward(passed.total)
            backward = time.perf_counter()
            if rows.stop < len(batch.input_ids):
                engine.step()  # DeepSpeed counts the micro-batch
            spent["forward"] += forward - mark
            spent["backward"] += backward - forward
        seen = self._collect(batch, losses, seconds=spent["forward"] + spent["backward"])
        mark = time.perf_counter()
        verdict, norm = self._finish(seen)
        spent["optimizer"] = time.perf_counter() - mark
        self.checkpoints.check()
        if verdict == "rollback":
            return False
        for domain, count in seen.windows_by_domain().items():
            self.state.windows_seen[domain] += count
        self.state.predicted += seen.predicted
        timing = {"seconds": time.perf_counter() - begun, **spent}
        self.state.seconds["steps"] += timing["seconds"]
        if verdict == "sound" and norm is not None:
            self.run_log.step(self.state, seen, rates=rates, norm=norm, timing=timing, what=what)
            for event in self.monitor.check(seen.load_LE, step=step) if seen.load_LE.size else ():
                self.run_log.event(
                    step, what=event.what, message=event.message, layer=event.layer, experts=list(event.experts)
                )
        return True

    def _collect(self, batch: Batch, losses: list[Any], *, seconds: float) -> StepResult:
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

    def _finish(self, seen: StepResult) -> tuple[str, float | None]:
        """Take the optimizer step, or what the guard says instead.

        Returns:
            The verdict, and the norm of the gradient; None if the loss was enough to give the step up.
        """
        step, loss = self.state.step, seen.loss
        told: dict[str, Any] = {"windows": seen.suspects(), "kept": self._kept}
        norm = None
        verdict = self.guard.judge(step=step, loss=loss, norm=None, **told)
        if verdict == "sound":
            norm = engines.finish_step(self.engine)
            verdict = self.guard.judge(step=step, loss=loss, norm=norm, **told)
        else:
            engines.discard_step(self.engine)
        if verdict == "sound":
            if self.objective.balancer:
                self.objective.balancer.end()
            return verdict, norm
        message = f"{self.guard.fault(loss=loss, norm=norm)} at step {step} (windows: {named(told['windows'])})"
        if verdict == "skip":
            self.run_log.event(step, what="skip", message=f"{message}: the batch is left out")
        else:
            self._roll_back(message)
        return verdict, norm

    def _roll_back(self, message: str) -> None:
        """Go back to the last checkpoint, and on from there with what comes after the batches drawn so far."""
        import torch

        failed = self.state.step
        self.checkpoints.finish()
        saved = self.checkpoints.latest()
        assert saved is not None, "one is written at step 0"
        self.sampler.set_weights(saved["weights"])
        rollback = Rollback(
            step=failed,
            to_step=saved["step"],
            message=f"{message}: back to the checkpoint of step {saved['step']}, and on with the batches after it",
            sampler=self.sampler.state(),
            guard=self.guard.state(),
        )
        if self.process.rank == 0:
            self.rollbacks.add(saved, rollback)
        torch.distributed.barrier()
        self._take_up(saved, first=False)

    def _kept(self) -> str:
        saved = self.checkpoints.latest()
        return f"the checkpoint of step {saved['step']} under {self.checkpoints.folder}" if saved else "nothing yet"

    def _evaluate(self) -> list[list[int]]:
        """Log the validation losses, move dynamic domain weights, return tokens per layer and expert."""
        import torch

        from tasks.moe.routing import expert_load

        begun, process = time.perf_counter(), self.process
        with expert_load(self.engine.module) as load_LE:
            losses = self.validation.evaluate(
                self.engine.module, batch=self.params.micro_batch, rank=process.rank, world_size=process.world_size
            )
        load = torch.from_numpy(load_LE).to(process.device)
        torch.distributed.all_reduce(load)
        if not np.isfinite(list(losses.values())).all():
            raise TrainingError(
                self.guard.message(
                    "the validation loss is not finite", step=self.state.step, windows=[], kept=self._kept()
                )
            )
        self._reweight(losses)
        self.run_log.validation(
            self.state,
            losses,
            references=self.reweighter.references if self.reweighter else self.validation.references,
            sampler=self.sampler.state(),
            load_LE=load.cpu().numpy(),
            seconds=time.perf_counter() - begun,
        )
        return load.tolist()

    def _reweight(self, losses: dict[str, float]) -> None:
        """Dynamic batch loading: the same on every rank, because the losses are."""
        if self.reweighter is None:
            return
        state, step = self.state, self.state.step
        if step == self.params.steps:
            self.reweighter.note(state.weights, losses=losses, step=step)
            return
        state.weights = self.reweighter.update(state.weights, losses=losses, step=step)
        self.sampler.set_weights(state.weights)

    def _save(self) -> None:
        from tasks.moe import gate

        if self.params.balance.loss == "bias":
            self.state.biases = gate.biases(self.engine.module)
        state = {
            **self.state.to_json(),
            "code": self._code,
            "log": self.run_log.sync(),
            "sampler": self.sampler.state(),
            "guard": self.guard.state(),
            "watch": self.monitor.state(),
            "reweighter": self.reweighter.state() if self.reweighter else None,
        }
        self.checkpoints.save(self.engine, state=state)

    def _take_up(self, saved: dict[str, Any], *, first: bool) -> None:
        """Go on from a checkpoint, and from where rollbacks to it have led since; `first`: at the start."""
        from tasks.moe import gate

        self.checkpoints.restore(self.engine, saved)
        self.state = State.of(saved)
        if self.state.biases:
            gate.set_biases(self.engine.module, self.state.biases)
        self.sampler.restore(saved["sampler"])
        self.guard.restore(saved["guard"])
        self.monitor.restore(saved["watch"])
        if self.reweighter:
            self.reweighter.restore(saved["reweighter"])
        self.run_log.open(offset=saved["log"]["bytes"], step=self.state.step)
        rollbacks = self.rollbacks.after(saved)
        for rollback in rollbacks:  # the log was cut back to the checkpoint
            self.run_log.event(rollback.to_step, what="rollback", message=rollback.message, sampler=rollback.sampler)
        if rollbacks:
            self.sampler.restore(rollbacks[-1].sampler)
            self.guard.restore(rollbacks[-1].guard)
        if not first:
            return
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
