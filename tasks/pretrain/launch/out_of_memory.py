"""Memory that ran out, told as the settings that need less."""

from __future__ import annotations

import errno

from tasks.settings import Pretrain

_CPU = ("DefaultCPUAllocator", "alloc_cpu.cpp")
_DEVICE = ("CUDA", "HIP", "cuda", "CUBLAS")


def explain(error: BaseException, params: Pretrain) -> str | None:
    """What to change, the cheapest first, if `error` or its cause says that memory ran out; None if not.

    Known: torch's OutOfMemoryError, CUDA's own errors, torch's CPU allocator's, MemoryError (and numpy's), ENOMEM.
    """
    cause: BaseException | None = error
    while cause is not None:
        if place := _where(cause):
            first = str(cause).strip().splitlines()
            said = f" ({first[0][:200]})" if first else ""
            on = "the accelerator's" if place == "device" else "the machine's"
            mend = _mend(params, device=place == "device")
            return f"{on} memory ran out in training{said}. {mend}. The last checkpoint is kept; run again to go on"
        cause = cause.__cause__
    return None


def killed(params: Pretrain) -> str:
    """The message for a process that signal 9 ended: all that a process killed for the machine's memory leaves."""
    return (
        "a training process was killed by signal 9: by hand, or because the machine's memory ran out. In that case: "
        f"{_mend(params, device=False)}"
    )


def settings(params: Pretrain, *, device: bool) -> list[str]:
    """What would need less memory, the cheapest first, each with its value now; only what still helps.

    Args:
        params: as they are.
        device: it's the accelerator's memory that ran out, not the machine's.
    """
    found = []
    windows = params.batch // params.processes  # of a process in a step; micro_batch divides it
    smaller = [size for size in range(1, params.micro_batch) if windows % size == 0]
    if smaller:
        found.append(f"pretrain.micro_batch: {smaller[-1]} (now {params.micro_batch})")
    if not params.gradient_checkpointing:
        found.append("gradient_checkpointing: true (now false)")
    distill = params.distill
    if distill and distill.top_n is None and not distill.hidden and not params.dynamic:
        found.append("distill.top_n: 64 (now absent, and the parent in memory)")
    if params.processes > 1 and params.zero_stage < 3:  # one process has nobody to share with
        found.append(f"zero_stage: {params.zero_stage + 1} (now {params.zero_stage})")
    if device:
        if not params.offload:
            needs = "" if params.zero_stage else ", with zero_stage: 1"
            found.append(f"offload: true (now false){needs}")
        more = [n for n in range(params.processes + 1, params.batch // params.micro_batch + 1) if _fits(n, params)]
        if more and params.zero_stage:
            found.append(f"processes: {more[0]} (now {params.processes}), each with an accelerator")
    elif params.launcher == "local" and (fewer := [n for n in range(1, params.processes) if _fits(n, params)]):
        found.append(f"processes: {fewer[-1]} (now {params.processes}), which share this machine's memory")
    return found


def _fits(processes: int, params: Pretrain) -> bool:
    """Whether this number of processes goes with the other settings."""
    return params.batch % (params.micro_batch * processes) == 0 and processes % params.expert_parallel == 0


def _mend(params: Pretrain, *, device: bool) -> str:
    found = settings(params, device=device)
    return f"Set {'; or '.join(found)}" if found else "No setting is left that needs less: shorten pretrain.seq_len"


def _where(error: BaseException) -> str | None:
    """`device` or `machine` if the error says that its memory ran out."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "machine"
    if not isinstance(error, RuntimeError):
        return None
    if any(mark in text for mark in _CPU) and "memory" in text:
        return "machine"
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text:
        return "device" if any(mark in text for mark in _DEVICE) else "machine"
    return None
