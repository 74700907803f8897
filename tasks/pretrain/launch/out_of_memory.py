"""Turns running out of memory into a list of settings that need less."""

from __future__ import annotations

import errno

from tasks.settings import Pretrain

_CPU = ("DefaultCPUAllocator", "alloc_cpu.cpp")
_DEVICE = ("CUDA", "HIP", "cuda", "CUBLAS")


def explain(error: BaseException, params: Pretrain) -> str | None:
    """The message for `error` if it, or its cause, says that memory ran out; None if not.

    Recognised: errors of torch's allocators and of CUDA, MemoryError (numpy's too) and ENOMEM.
    """
    cause: BaseException | None = error
    while cause is not None:
        if owner := _owner(cause):
            first = str(cause).strip().splitlines()
            details = f" ({first[0][:200]})" if first else ""
            fix = _fix(params, device=owner == "accelerator")
            return (
                f"the {owner}'s memory ran out in training{details}. {fix}. The last checkpoint is kept; run again to "
                "go on"
            )
        cause = cause.__cause__
    return None


def killed(params: Pretrain) -> str:
    """The message for a process that signal 9 ended, as the kernel does when the machine's memory runs out."""
    return (
        "a training process was killed by signal 9: by hand, or because the machine's memory ran out. In that case: "
        f"{_fix(params, device=False)}"
    )


def settings(params: Pretrain, *, device: bool) -> list[str]:
    """Settings that would need less memory, the cheapest first, each with its value now; only those that still help.

    Args:
        params: the run's.
        device: the accelerator's memory ran out, not the machine's.
    """
    changes = []
    windows = params.batch // params.processes  # of a process in a step; micro_batch divides it
    smaller = [size for size in range(1, params.micro_batch) if windows % size == 0]
    if smaller:
        changes.append(f"pretrain.micro_batch: {smaller[-1]} (now {params.micro_batch})")
    if not params.gradient_checkpointing:
        changes.append("gradient_checkpointing: true (now false)")
    distill = params.distill
    if distill and distill.top_n is None and not distill.hidden and not params.moves_weights:
        changes.append("distill.top_n: 64 (now absent, and the parent in memory)")
    if params.processes > 1 and params.zero_stage < 3:  # one process has nobody to share with
        changes.append(f"zero_stage: {params.zero_stage + 1} (now {params.zero_stage})")
    if device:
        if not params.offload:
            needs = "" if params.zero_stage else ", with zero_stage: 1"
            changes.append(f"offload: true (now false){needs}")
        more = [n for n in range(params.processes + 1, params.batch // params.micro_batch + 1) if _fits(n, params)]
        if more and params.zero_stage:
            changes.append(f"processes: {more[0]} (now {params.processes}), each with an accelerator")
    elif params.launcher == "local" and (fewer := [n for n in range(1, params.processes) if _fits(n, params)]):
        changes.append(f"processes: {fewer[-1]} (now {params.processes}), which share this machine's memory")
    return changes


def _fits(processes: int, params: Pretrain) -> bool:
    """Whether this number of processes goes with the other settings."""
    return params.batch % (params.micro_batch * processes) == 0 and processes % params.expert_parallel == 0


def _fix(params: Pretrain, *, device: bool) -> str:
    changes = settings(params, device=device)
    return (
        f"Set {'; or '.join(changes)}" if changes else "No setting is left that needs less: shorten pretrain.seq_len"
    )


def _owner(error: BaseException) -> str | None:
    """`accelerator` or `machine` if the error says that its memory ran out."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "machine"
    if not isinstance(error, RuntimeError):
        return None
    if any(mark in text for mark in _CPU) and "memory" in text:
        return "machine"
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text:
        return "accelerator" if any(mark in text for mark in _DEVICE) else "machine"
    return None
