"""What this machine has for a plan: memory that fits or not, and the speed of its matrix products."""

from __future__ import annotations

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


def matrix_speed(*, bfloat16: bool) -> tuple[float, str]:
    """FLOP/s of one process on this machine (`meters.peak`), and what computes them: a GPU, or all CPU threads."""
    import torch

    from tasks.pretrain.log import meters

    device = torch.device(devices.default())
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return meters.peak(device, torch.bfloat16 if bfloat16 else torch.float32), where
