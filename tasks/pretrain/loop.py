"""The training loop."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.pretrain import batches, checkpoint, objective, schedule
from tasks.pretrain import engine as engines
from tasks.pretrain.heldout import Heldout
from tasks.pretrain.job import Job, TrainingError, code_version
from tasks.pretrain.log import Log
from tasks.pretrain.progress import Progress

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands."""

    rank: int
    world_size: int
    device: torch.device


class Trainer:
    """One run from its first or its next step to its last. Every rank has one and makes the same calls in order."""

    def __init__(self, job: Job, *, engine: DeepSpeedEngine, place: Place) -> None:
        from tasks.corpus import manifest

        self.job, self.engine, self.place = job, engine, place
        self.params = job.params
        mixture = json.loads(job.mixture.read_text())
        corpus = manifest.load(job.corpus)
        if mixture["weights"].keys() != corpus.domains.keys():
            raise TrainingError(
                f"{job.mixture} has the domains {', '.join(sorted(mixture['weights']))}, and {job.corpus} has "
                f"{', '.join(sorted(corpus.domains))}; run the stages `corpus` and `mixture` again"
            )
        manifest.require_tokenizer(corpus, job.model)
        self.heldout = Heldout.load(job, mixture["evidence"])
        self.domains = list(corpus.domains)
        self.weights: dict[str, float] = mixture["weights"]
        self.history: list[tuple[int, dict[str, float]]] = [(0, self.weights)]
        self.sampler, self.loader = batches.draw(
            job, self.weights, corpus_sha256=corpus.sha256, rank=place.rank, world_size=place.world_size
        )
        self.windows_seen = dict.fromkeys(self.domains, 0)
        self.predicted = 0
        self.load_before: list[list[int]] = []
        self.load_after: list[list[int]] = []
        self.seconds = {"steps": 0.0, "total": 0.0}
        self.resumed_from: dict[str, Any] | None = None
        self.step = 0
        self.log: Log | None = None
        self._checkpoints = job.workspace / "checkpoints"
        self._progress = Progress(self.params.steps, tokens_per_step=self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        return self.params.batch * self.params.seq_len

    def run(self) -> None:
        """Train to the last step, from the last checkpoint if there is one.

        Raises:
            TrainingError: the loss or the gradient is not finite, or a checkpoint cannot be written or resumed.
        """
        begun = time.perf_counter()
        offset = self._resume()
        before = self.seconds["total"]
        if self.place.rank == 0:
            self.log = Log(self.job.workspace / "training", offset=offset, step=self.step)
        if self.step == 0:
            self.load_before = self._evaluate()
        while self.step < self.params.steps:
            self.step += 1
            self._train_step()
            last = self.step == self.params.steps
            if last:
                self.load_after = self._evaluate()
            elif self.step % self.params.eval_every == 0:
                self._evaluate()
            self.seconds["total"] = before + time.perf_counter() - begun
            if last or self.step % self.params.save_every == 0:
                self._save()
        if self.log:
            self.log.close()
            self._progress.close()

    def _train_step(self) -> None:
        begun = time.perf_counter()
        spent = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        params, engine = self.params, self.engine
        lr = params.learning_rate * schedule.share(self.step, params)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        batch = self.loader.next()
        losses, balances = [], []
        for start in range(0, len(batch.input_ids), params.micro_batch):
            mark = time.perf_counter()
            rows = slice(start, start + params.micro_batch)
            loss_B, balance = objective.losses(
                engine, batch, rows=rows, device=self.place.device, balance=params.balance.loss != "none"
            )
            losses.append(loss_B.detach())
            balances.append(balance.detach().expand_as(loss_B))
            forward = time.perf_counter()
            engine.backward(loss_B.mean() + params.balance.coefficient * balance)
            backward = time.perf_counter()
            if start + params.micro_batch < len(batch.input_ids):
                engine.step()
            else:
                found = self._collect(batch, losses, balances)
                norm = engines.finish_step(engine)
            spent["forward"] += forward - mark
            spent["backward"] += backward - forward
            spent["optimizer"] += time.perf_counter() - backward
        if not np.isfinite(norm):
            raise TrainingError(self._not_finite("gradient norm", found["slots"]))
        self._record(found, lr=lr, norm=norm, timing={"seconds": time.perf_counter() - begun, **spent})

    def _collect(self, batch: Any, losses: list[torch.Tensor], balances: list[torch.Tensor]) -> dict[str, Any]:
        """The whole batch's losses on every rank, in slot order; raises TrainingError if one is not finite."""
        import torch

        mine = slice(self.place.rank, None, self.place.world_size)
        table = torch.zeros(5, self.params.batch, dtype=torch.float64)
        table[0, mine] = torch.cat(losses).double().cpu()
        table[1, mine] = torch.cat(balances).double().cpu()
        table[2, mine] = torch.tensor([self.domains.index(domain) for domain in batch.domains], dtype=torch.float64)
        table[3, mine] = torch.tensor(batch.windows, dtype=torch.float64)
        table[4, mine] = torch.from_numpy(objective.predicted(batch.labels)).double()
        table = table.to(self.place.device)
        torch.distributed.all_reduce(table)
        loss, balance, domain, window, predicted = table.cpu().numpy()
        slots = [(self.domains[int(d)], int(w)) for d, w in zip(domain, window, strict=True)]
        bad = ~np.isfinite(loss + balance)
        if bad.any():
            raise TrainingError(self._not_finite("loss", [slot for slot, b in zip(slots, bad, strict=True) if b]))
        return {"loss": loss, "balance": balance, "slots": slots, "predicted": int(predicted.sum())}

    def _not_finite(self, what: str, slots: list[tuple[str, int]]) -> str:
        last = checkpoint.find(self._checkpoints)
        kept = f"the checkpoint of step {last['step']} under {self._checkpoints}" if last else "nothing yet"
        where = ", ".join(f"{domain} window {window}" for domain, window in slots)
        where = f" (windows of {self.params.seq_len} tokens: {where})" if slots else ""
        return (
            f"the {what} is not finite at step {self.step}{where}. Kept: {kept}. Try a lower pretrain.learning_rate, "
            "more warmup_steps, a lower clip, or precision: float32; look at those windows if it comes back at the "
            "same step"
        )

    def _record(self, found: dict[str, Any], *, lr: float, norm: float, timing: dict[str, float]) -> None:
        self.seconds["steps"] += timing["seconds"]
        self.predicted += found["predicted"]
        domains = np.array([domain for domain, _ in found["slots"]])
        per_domain = {}
        for domain in self.domains:
            losses = found["loss"][domains == domain]
            if len(losses):
                self.windows_seen[domain] += len(losses)
                per_domain[domain] = {"loss": float(losses.mean()), "windows": len(losses)}
        if not self.log:
            return
        loss = float(found["loss"].mean())
        self.log.write(
            {
                "kind": "step",
                "step": self.step,
                "tokens": self.step * self.tokens_per_step,
                "predicted": found["predicted"],
                "loss": loss,
                "balance": float(found["balance"].mean()),
                "grad_norm": norm,
                "lr": lr,
                "domains": per_domain,
                "timing": {**timing, "tokens_per_second": self.tokens_per_step / timing["seconds"]},
            }
        )
        self._progress.step(self.step, loss=loss, lr=lr, seconds=timing["seconds"])

    def _evaluate(self) -> list[list[int]]:
        """Log the held-out losses, move the domain weights if they are dynamic, return tokens per layer and expert."""
        import torch

        from tasks.moe.routing import expert_load

        begun = time.perf_counter()
        place = self.place
        with expert_load(self.engine.module) as load_LE:
            losses = self.heldout.evaluate(
                self.engine.module, batch=self.params.micro_batch, rank=place.rank, world_size=place.world_size
            )
        load = torch.from_numpy(load_LE).to(place.device)
        torch.distributed.all_reduce(load)
        if not np.isfinite(list(losses.values())).all():
            raise TrainingError(self._not_finite("held-out loss", []))
        if self.params.dynamic and self.step < self.params.steps:
            self._reweight(losses)
        mean = float(np.mean(list(losses.values())))
        if self.log:
            tokens = self.step * self.tokens_per_step
            timing = {"seconds": time.perf_counter() - begun}
            record = {"kind": "heldout", "step": self.step, "tokens": tokens, "mean": mean, "losses": losses}
            record |= {"weights": self.weights, "sampler": self.sampler.state()}
            self.log.write({**record, "timing": timing})
            shown = "  ".join(f"{domain} {loss:.4f}" for domain, loss in losses.items())
            self._progress.say(f"held out at step {self.step}: mean {mean:.4f}  {shown}")
        return load.tolist()

    def _reweight(self, losses: dict[str, float]) -> None:
        """Dynamic batch loading (Sheared-LLaMA, arXiv 2310.06694, algorithm 1); rank 0 decides for all."""
        import torch

        from tasks.corpus import weights

        assert self.heldout.references is not None
        decided = [weights.update(self.weights, losses=losses, references=self.heldout.references)]
        torch.distributed.broadcast_object_list(decided, src=0)
        self.weights = decided[0]
        self.sampler.set_weights(self.weights)
        self.history.append((self.step, self.weights))

    def _save(self) -> None:
        log_bytes = self.log.sync() if self.log else 0
        state = {
            "step": self.step,
            "world_size": self.place.world_size,
            "code": code_version() if self.place.rank == 0 else "",
            "log_bytes": log_bytes,
            "sampler": self.sampler.state(),
            "weights": self.weights,
            "history": self.history,
            "windows_seen": self.windows_seen,
            "predicted": self.predicted,
            "load_before": self.load_before,
            "load_after": self.load_after,
            "seconds": self.seconds,
            "resumed_from": self.resumed_from,
        }
        checkpoint.save(self.engine, self._checkpoints, state=state, rank=self.place.rank)

    def _resume(self) -> int:
        """Take up the last checkpoint; returns the length of the log at that point."""
        import torch

        if self.place.rank == 0:
            self._checkpoints.mkdir(exist_ok=True)
            checkpoint.clean(self._checkpoints)
        torch.distributed.barrier()
        state = checkpoint.find(self._checkpoints)
        if state is None:
            return 0
        checkpoint.check_world_size(state, self.place.world_size)
        checkpoint.restore(self.engine, self._checkpoints, tag=state["tag"], rank=self.place.rank)
        self.sampler.restore(state["sampler"])
        self.step, self.weights, self.seconds = state["step"], state["weights"], state["seconds"]
        self.history = [(step, weights) for step, weights in state["history"]]
        self.windows_seen, self.predicted = state["windows_seen"], state["predicted"]
        self.load_before, self.load_after = state["load_before"], state["load_after"]
        self.resumed_from = {"step": self.step, "code": state["code"]}
        if self.place.rank == 0:
            self._progress.say(f"going on from the checkpoint of step {self.step}")
            if state["code"] != code_version():
                self._progress.say(
                    f"that checkpoint was written by the code of {state['code']}, and this is {code_version()}: "
                    "the run is not the one that either alone would give"
                )
        return int(state["log_bytes"])
