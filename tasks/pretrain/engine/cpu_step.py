"""ZeRO 1's optimizer step on a CPU, in two passes over the memory: one for the norm, one for everything else.

DeepSpeed's own goes over gradients, weights and moments a dozen times: into a bucket and out of it, the division by
the number of processes, the search for infinities, the norm, the concatenation, fp32, clipping, AdamW, bfloat16. A GPU
hardly notices. On a CPU it takes a sixth of a step of the demo's model (docs/pretrain.md). Here AdamW takes a piece
at a time that fits the cache, and a process that is alone leaves its gradients where backward put them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

PIECE = 1 << 19
"""Elements that are updated at once: 2 MB in fp32. Half or twice as many are a tenth slower."""


def install(engine: DeepSpeedEngine) -> None:
    """Let the engine step so, if its optimizer is ZeRO 1's on a CPU, without offload, expert parallelism and bfloat16
    micro-batches, for which DeepSpeed has another one.

    Call it when `optimizer.prepare` has made the moments and put in its hooks, which decide what is updated.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero: Any = engine.optimizer
    if (
        engine.device.type != "cpu"
        or engine.zero_optimization_stage() != 1
        or type(zero) is not DeepSpeedZeroOptimizer
    ):
        return
    if zero.cpu_offload or zero.use_grad_accum_attribute:
        return
    step = _Step(zero)
    zero.step = step.take
    engine.basic_optimizer.register_step_pre_hook(step.update)
    if engine.dp_world_size == 1:
        # There is nobody to exchange gradients with: no bucket to fill, and none to hold memory.
        zero.reduce_independent_p_g_buckets_and_remove_grads = lambda parameter, group: None
        zero.reduce_ipg_grads = lambda comm_dtype=None: None
        zero.reduce_bucket_size = 1  # it divides by it


class _Step:
    """What stands in for the method `step` of a DeepSpeedZeroOptimizer."""

    def __init__(self, zero: Any) -> None:
        self._zero, self._scale = zero, 1.0
        self._buffer = torch.empty(PIECE, dtype=torch.float32)

    @torch.no_grad()
    def take(self, closure: None = None) -> None:
        """Update weights and moments, or leave them if the gradient is not finite; either way forget the gradient."""
        from deepspeed.runtime.utils import all_gather_dp_groups

        zero = self._zero
        zero.micro_step_id = -1
        norm = self._norm()
        zero.overflow = not math.isfinite(norm)
        zero._global_grad_norm = math.inf if zero.overflow else norm
        if not zero.overflow:
            self._scale = max(1.0, (norm + 1e-6) / zero.clip_grad) if zero.clip_grad else 1.0
            # Its hooks wait for a checkpoint's copies, hold back what the phase leaves out, and call `update`. The
            # fp32 weights have no `grad`, so AdamW itself finds nothing more to do.
            zero.optimizer.step()
            zero._lazy_init_hp_params_optimizer_state()
            all_gather_dp_groups(
                groups_flat=zero.bit16_groups_flat,
                partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
                dp_process_group=zero.real_dp_process_group,
                start_alignment_factor=zero.nccl_start_alignment_factor,
                allgather_bucket_size=zero.allgather_bucket_size,
            )
        zero.zero_grad()
        for sums in (zero.averaged_gradients, zero.all_grad_tensors):
            sums.update(dict.fromkeys(sums))

    def _norm(self) -> float:
        """The norm of the whole gradient, of all ranks' parts."""
        zero = self._zero
        gradients = [
            gradient for group in range(len(zero.bit16_groups)) for gradient in zero.averaged_gradients[group]
        ]
        square = sum(float(torch.dot(piece, piece)) for _, piece in self._pieces(gradients))
        total = torch.tensor(square, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=zero.dp_process_group)
        return float(total.sqrt())

    @torch.no_grad()
    def update(self, adam: torch.optim.Optimizer, *_: Any) -> None:
        """AdamW on the fp32 weights and their copies in the training dtype (a hook of torch's AdamW)."""
        zero, scale = self._zero, torch.tensor(self._scale, dtype=torch.float32)
        for number, group in enumerate(adam.param_groups):
            rank = torch.distributed.get_rank(zero.real_dp_process_group[number])
            weights = zero.parallel_partitioned_bit16_groups[number][rank]
            for master in group["params"]:  # one, or none if the phase leaves it out
                state = adam.state[master]
                state["step"] += 1
                for start, gradient in self._pieces(zero.averaged_gradients[number]):
                    part = slice(start, start + len(gradient))
                    torch._fused_adamw_(
                        [master[part]],
                        [gradient],
                        [state["exp_avg"][part]],
                        [state["exp_avg_sq"][part]],
                        [],
                        [state["step"]],
                        lr=group["lr"],
                        beta1=group["betas"][0],
                        beta2=group["betas"][1],
                        weight_decay=group["weight_decay"],
                        eps=group["eps"],
                        amsgrad=False,
                        maximize=False,
                        grad_scale=scale,
                    )
                    weights[part].copy_(master[part])

    def _pieces(self, gradients: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """A flat gradient, given in parts, as fp32 pieces with their first places. The next one overwrites a piece."""
        start = filled = 0
        for gradient in gradients:
            for part in gradient.reshape(-1).split(PIECE):
                if filled + len(part) > PIECE:
                    yield start, self._buffer[:filled]
                    start, filled = start + filled, 0
                self._buffer[filled : filled + len(part)].copy_(part)
                filled += len(part)
        if filled:
            yield start, self._buffer[:filled]
