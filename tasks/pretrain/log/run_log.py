"""Makes the records of a run on rank 0; on other ranks the run log does nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from tasks.display import Progress
from tasks.moe import counts
from tasks.pretrain.checkpoints.run_state import RunState
from tasks.pretrain.job import Job
from tasks.pretrain.launch.process import Process
from tasks.pretrain.log import meters, trackers
from tasks.pretrain.log.log_file import LogFile
from tasks.pretrain.step_result import StepResult

if TYPE_CHECKING:
    from tasks.pretrain.engine.interface import Engine
    from tasks.settings.pretrain import Part, What

_STRAGGLERS_EVERY = 20  # steps over which the ranks' times are summed before they are compared


class RunLog:
    """Writes the records of a run to the log, the trackers and the display."""

    def __init__(self, job: Job, *, engine: Engine, process: Process, epoch_tokens: Mapping[str, int]) -> None:
        """`epoch_tokens`: training tokens of each domain of the corpus."""
        self.job, self.params, self.process = job, job.params, process
        self._epoch_tokens = epoch_tokens
        self._log: LogFile | None = None
        rank_0 = process.rank == 0
        self._display = Progress(self.params.steps, label="", unit="step", stream=sys.stdout) if rank_0 else None
        self._config: Any = engine.module.config
        self.peak = meters.peak(process.device, engine.dtype) * process.world_size
        self._seconds_R = np.zeros(process.world_size)
        self._teacher_flops = 0
        if self.params.distill and self.params.distill.top_n is None:
            parent = json.loads((job.parent / "config.json").read_text())
            self._teacher_flops = counts.flops_per_token(parent, seq_len=self.params.seq_len)["forward"]

    def __enter__(self) -> Self:
        if self._display:
            self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._log:
                self._log.close(failed=error is not None)
        finally:
            if self._display:
                self._display.__exit__()

    def open(self, *, offset: int, step: int) -> None:
        """Continue after `offset` bytes of the log and after `step`; the rest of the log is cut off."""
        if not self._display:
            return
        self._display.begin(step)
        if self._log:  # back to a checkpoint
            self._log.rewind(offset=offset, step=step)
            return
        run = trackers.Run(
            folder=self.job.workspace / "training",
            name=self.job.pipeline,
            key=f"{self.job.pipeline}-{self.job.workspace.name}",
            config=self.params.model_dump(),
        )
        self._log = LogFile(run, names=self.params.trackers, offset=offset, step=step, say=self.say)

    def step(
        self,
        state: RunState,
        result: StepResult,
        *,
        rates: Mapping[Part, float],
        norm: float,
        timing: dict[str, float],
        what: What,
        more: Mapping[str, Any],
    ) -> None:
        """Log a step that the guard let pass. `more`: the entries of hooks."""
        if not self._log:
            return
        params = self.params
        means = {name: result.mean(name) for name in result.losses}
        loss = means.pop("loss")
        weight = params.distill.cross_entropy if params.distill else 1.0
        record: dict[str, Any] = {
            "kind": "step",
            "step": state.step,
            "tokens": state.step * params.step_tokens,
            "predicted": result.predicted,
            "loss": loss,
            "parts": means,
            "total": weight * loss + sum(means.values()),
            "grad_norm": norm,
            "lr": max(rates.values()),
            "domains": self._domains(state, result),
            "experts": meters.expert_load(result.load_LE, detailed=params.expert_log == "detailed"),
        }
        record |= more
        if len(set(rates.values())) > 1:
            record["rates"] = dict(rates)
        spent = {name: value for name, value in timing.items() if name != "seconds"}
        record["timing"] = meters.timing(
            timing["seconds"],
            spent,
            tokens=params.step_tokens,
            flops_per_token=meters.flops(self._config, seq_len=params.seq_len, what=what),
            peak=self.peak,
            extra_flops_per_token=self._teacher_flops,
            device=self.process.device,
        )
        if self.process.world_size > 1:
            record["timing"]["ranks"] = result.seconds_R
        self._write(record)
        self._compare_ranks(state.step, result)

    def validation(
        self,
        state: RunState,
        losses: Mapping[str, float],
        *,
        references: Mapping[str, float] | None,
        sampler: dict[str, Any],
        load_LE: np.ndarray,
        seconds: float,
        more: Mapping[str, Any],
    ) -> None:
        """Log an evaluation, with the domain weights that hold from here on. `more`: the entries of hooks."""
        record = {
            "kind": "validation",
            "step": state.step,
            "tokens": state.step * self.params.step_tokens,
            "mean": float(np.mean(list(losses.values()))),
            "losses": dict(losses),
            "weights": state.weights,
            "sampler": sampler,
            "experts": meters.expert_load(load_LE, detailed=False),
        }
        if references is not None:
            record["references"] = dict(references)
        self._write({**record, **more, "timing": {"seconds": seconds}})

    def event(self, step: int, *, what: str, message: str, **details: Any) -> None:
        """Log something that a person should know."""
        self._write({"kind": "event", "step": step, "what": what, "message": message, **details})

    def say(self, text: str) -> None:
        """Print a line, without logging it."""
        if self._display:
            self._display.say(text)

    def sync(self) -> dict[str, Any]:
        """Bring the log to the disk; returns its bytes and digest; {} on the other ranks."""
        return self._log.sync() if self._log else {}

    def _write(self, record: dict[str, Any]) -> None:
        if self._log and self._display:
            self._log.write(record)
            if record["kind"] == "event":
                self.say(f"step {record['step']}: {record['message']}")
            elif record["kind"] == "validation":
                losses = "  ".join(f"{domain} {loss:.4f}" for domain, loss in record["losses"].items())
                self.say(f"validation at step {record['step']}: mean {record['mean']:.4f}  {losses}")
            else:
                timing = record["timing"]
                mfu = f"  MFU {timing['mfu']:.0%}" if "mfu" in timing else ""
                speed = f"{timing['tokens_per_second']:.0f} tokens/s{mfu}"
                self._display.reach(record["step"], f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {speed}")

    def _domains(self, state: RunState, result: StepResult) -> dict[str, dict[str, float]]:
        windows = result.windows_by_domain()
        return {
            domain: {
                "loss": result.of_domain(domain),
                "windows": windows[domain],
                "epochs": state.windows_seen[domain] * self.params.seq_len / self._epoch_tokens[domain],
            }
            for domain in state.windows_seen
            if domain in windows
        }

    def _compare_ranks(self, step: int, result: StepResult) -> None:
        self._seconds_R += result.seconds_R
        if step % _STRAGGLERS_EVERY == 0:
            for line in meters.stragglers(self._seconds_R.tolist(), self.process.hosts):
                self.say(line)
            self._seconds_R[:] = 0
