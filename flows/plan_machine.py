"""What this machine has for a plan: memory that fits or not, and the speed of its matrix products."""

from __future__ import annotations

import time

from tasks.moe import device as devices
from tasks.tools.estimate import Memory


def lacks(first: Memory, others: list[Memory]) -> str:
    """What of this machine the processes that run on it need more of than there is; empty if they fit."""
    import psutil
    import torch

    short = []
    ram = psutil.virtual_memory().total
    if (needed := sum(memory.host_total for memory in (first, *others))) > ram:
        short.append(f"RAM: {needed / 1e9:.1f} of {ram / 1e9:.1f} GB")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0).total_memory
        if first.device_total > card:
            short.append(f"GPU: {first.device_total / 1e9:.1f} of {card / 1e9:.1f} GB")
    return f"does not fit here ({', '.join(short)})" if short else ""


def matrix_speed(*, bfloat16: bool, seconds: float = 0.5) -> tuple[float, str]:
    """Measure this machine's matrix products: (FLOP/s, what was measured), on one GPU or on all CPU threads."""
    import torch

    device = devices.default()
    size = 8192 if device == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)

    def product() -> None:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    product()
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        product()
        done += 1
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return done * 2 * size**3 / spent, where
