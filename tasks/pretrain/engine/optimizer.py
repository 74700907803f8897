"""DeepSpeed's optimizer: rates and phases by group, AdamW's moments from the start, steps taken or given up.

`engine` is DeepSpeed's; `basic_optimizer` in it is torch's AdamW, and `optimizer` is what ZeRO or bfloat16 puts
around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.pretrain import schedule, trainable
from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

    from tasks.settings.pretrain import Part, What


_FIRST_MICRO_STEP = {1: -1, 2: -1, 3: 0}
"""What DeepSpeed's count of micro-batches stands at before the first one, by ZeRO stage."""


def set_rates(engine: DeepSpeedEngine, *, step: int, params: Pretrain) -> dict[Part, float]:
    """Set the learning rates of optimizer step `step` (from 1), and what it trains. Call it before its forward pass.

    Returns:
        The rate of each part that the optimizer has; 0 where the phase leaves the part out.
    """
    what = params.phase(step)
    if len(params.phases) > 1:
        activate(engine, what)
    share = schedule.share(step, params)
    rates: dict[Part, float] = {}
    for group in engine.optimizer.param_groups:
        part: Part = group["part"]
        peak = params.learning_rates.get(part, params.learning_rate)
        rates[part] = group["lr"] = peak * share if part in trainable.TRAINED[what] else 0.0
    return rates


def activate(engine: DeepSpeedEngine, what: What) -> None:
    """Train the parts of one of the engine's phases alone from the next forward pass on."""
    trainable.require(engine.module, trainable.TRAINED[what])
    for group in engine.optimizer.param_groups:
        group["active"] = group["part"] in trainable.TRAINED[what]


@contextmanager
def all_phases(engine: DeepSpeedEngine) -> Iterator[None]:
    """Let what any phase trains require gradients within the block, in which DeepSpeed saves or loads.

    Else it keeps what the phase leaves out apart, where loading in another phase doesn't find it, and with ZeRO-3 and
    expert parallelism it refuses to save experts that a phase leaves out.
    """
    model: Any = engine.module
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    trainable.require(model, {group["part"] for group in engine.optimizer.param_groups})
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def prepare(optimizer: torch.optim.Optimizer) -> None:
    """Start AdamW's moments, and let its step pass over groups that are not active: neither weights nor moments move.

    A rate of 0 would still move the moments. Every ZeRO stage steps its own flat tensors through this optimizer, so
    here is the one place to hold all of them back. The moments are there from the start because DeepSpeed links them
    to its parameters once, after the first step of the first group, and misses those that come later.
    """
    held: list[tuple[dict[str, Any], list[torch.Tensor]]] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if not group["active"]:
                held.append((group, group["params"]))
                group["params"] = []
                _start(optimizer, held[-1][1])  # stage 3 shows its tensors in the step alone

    def after(*_: Any) -> None:
        while held:
            group, parameters = held.pop()
            group["params"] = parameters

    for group in optimizer.param_groups:
        _start(optimizer, group["params"])
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _start(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> None:
    """Give AdamW's state before its first step to what has none."""
    import torch

    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)


def undo_first_step(engine: DeepSpeedEngine) -> None:
    """Undo the step with zero gradients that stage 0 in bfloat16 takes to make its moments.

    It decays the fp32 weights once at the full rate, and counts as a step in the correction of the moments.
    """
    if hasattr(engine.optimizer, "fp32_groups"):
        engine.basic_optimizer.state.clear()
        for low, high in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            for parameter, fp32 in zip(low, high, strict=True):
                fp32.data.copy_(parameter.data)


def finish(engine: DeepSpeedEngine) -> float:
    """Take the optimizer step after the last micro-batch's backward pass, if the gradient is finite.

    Returns:
        The norm of the whole gradient before clipping, the same on every rank. If it is not finite, weights and
        optimizer are as they were, and the gradients are forgotten.
    """
    import torch

    norm = None
    if not engine.zero_optimization() and not engine.bfloat16_enabled():  # the one case where DeepSpeed has no norm
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            discard(engine)
            return norm
    engine.step()
    if not engine.was_step_applied():
        discard(engine)  # with offload, DeepSpeed would add the next gradients to these
        return float("nan")
    return float(engine.get_global_grad_norm()) if norm is None else norm


def discard(engine: DeepSpeedEngine) -> None:
    """Forget the gradients of this optimizer step's micro-batches: the next one begins as if they had not been.

    All ranks call it after a backward pass, at any micro-batch, and before `finish`.
    """
    optimizer = engine.optimizer
    engine.zero_grad()
    if hasattr(optimizer, "micro_step_id"):  # ZeRO 1, 2 and 3 keep sums of their own
        optimizer.zero_grad()
        optimizer.micro_step_id = _FIRST_MICRO_STEP[engine.zero_optimization_stage()]
        optimizer.reset_cpu_buffers()
        for sums in (optimizer.averaged_gradients, getattr(optimizer, "all_grad_tensors", {})):
            sums.update(dict.fromkeys(sums))
    elif engine.bfloat16_enabled():
        optimizer.zero_grad()
    engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()
