"""Measures a step: load of the experts, memory, FLOP/s and model FLOPs utilization (MFU).

MFU counts what training on a token needs with its active parameters. Recomputation under gradient checkpointing,
padded rows and a teacher's passes take time and are not counted.

L = sparse layers, E = experts of a layer.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.moe import counts

if TYPE_CHECKING:
    import torch

    from tasks.settings.pretrain import What

_SLOW = 1.5
BF16_PEAKS = {
    "B200": 2250e12,
    "B100": 1750e12,
    "H200": 989.4e12,
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "GH200": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989.4e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 FLOP/s with fp32 accumulation, from NVIDIA's data sheets. The first name that is in the card's counts."""
SECONDS = 0.2
"""In which the best product is looked for: five of them, 30 ms, may all fall into another process's turn."""
_DIGITS = 4  # of the shares in the log: 30 layers a step add up


def expert_load(load_LE: np.ndarray, *, detailed: bool) -> dict[str, Any]:
    """How evenly the tokens of a step were spread over the experts.

    Args:
        load_LE: tokens per sparse layer and expert, over all ranks.
        detailed: return the counts too.

    Returns:
        used (share of the experts with tokens), entropy (of the experts' shares of the tokens, over ln E: 1 is even),
        peak (the busiest expert's share), all means over the layers; dead (experts without tokens in all layers);
        layers {used, entropy, peak: a number a sparse layer}; tokens (load_LE as lists), if `detailed`. An empty dict
        for a dense model.
    """
    if not load_LE.size:
        return {}
    share_LE = load_LE / np.maximum(load_LE.sum(1, keepdims=True), 1)
    surprise_LE = -share_LE * np.log(np.where(share_LE > 0, share_LE, 1.0))
    layers = {
        "used": (load_LE > 0).mean(1),
        "entropy": surprise_LE.sum(1) / np.log(max(load_LE.shape[1], 2)),
        "peak": share_LE.max(1),
    }
    result: dict[str, Any] = {name: round(float(values.mean()), _DIGITS) for name, values in layers.items()}
    result["dead"] = int((load_LE == 0).sum())
    result["layers"] = {name: values.round(_DIGITS).tolist() for name, values in layers.items()}
    if detailed:
        result["tokens"] = load_LE.tolist()
    return result


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of this process: rss, rss_peak; on CUDA also allocated, allocated_peak and reserved_peak of `device`."""
    import torch

    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used = {name: int(fields[key].split()[0]) << 10 for name, key in (("rss", "VmRSS"), ("rss_peak", "VmHWM"))}
    if device.type == "cuda":
        used["allocated"] = torch.cuda.memory_allocated(device)
        used["allocated_peak"] = torch.cuda.max_memory_allocated(device)
        used["reserved_peak"] = torch.cuda.max_memory_reserved(device)
    return used


def flops(config: Any, *, seq_len: int, what: What = "all") -> int:
    """FLOPs of training on one token with its active parameters: a forward pass, and the backward for `what`."""
    return counts.flops_per_token(config, seq_len=seq_len, what=what)["train"]


def peak(device: torch.device, dtype: torch.dtype, *, size: int = 512, rounds: int = 5) -> float:
    """FLOP/s of one device that MFU is a share of.

    The data sheet's for bf16 and fp16 on a card in BF16_PEAKS; else the best of `rounds` products of square matrices
    of `size` (16 times that on CUDA) in `dtype`, or of as many as SECONDS hold. On a processor one thread computes
    them, and the peak is that of all of this process's threads: products of several threads wait for the last one,
    so that beside other work none may be undisturbed.
    """
    import torch

    if device.type == "cuda":
        if dtype in {torch.bfloat16, torch.float16}:
            name = torch.cuda.get_device_name(device)
            known = next((value for card, value in BF16_PEAKS.items() if re.search(rf"\b{card}\b", name)), None)
            if known is not None:
                return known
        size *= 16
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a = torch.ones(size, size, dtype=dtype, device=device)
    durations: list[float] = []
    while len(durations) < rounds or sum(durations) < SECONDS:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # the read waits for the device
        durations.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * size**3 / min(durations) * (1 if device.type == "cuda" else threads)


def timing(
    seconds: float,
    spent: dict[str, float],
    *,
    tokens: int,
    flops_per_token: int,
    peak: float,
    device: torch.device,
    extra_flops_per_token: int = 0,
) -> dict[str, Any]:
    """A step record's `timing`.

    Args:
        seconds: of the whole step.
        spent: seconds of its parts, such as data, forward, backward, optimizer.
        tokens: of the global batch.
        flops_per_token: `flops`.
        peak: FLOP/s of all ranks together.
        device: this rank's.
        extra_flops_per_token: of what MFU leaves out, such as the forward pass of a resident teacher.

    Returns:
        seconds, the parts, other (what they leave), tokens_per_second, flops_per_second, mfu, memory, and
        extra_flops_per_second if there are such.
    """
    speed = tokens / seconds
    extra = {"extra_flops_per_second": extra_flops_per_token * speed} if extra_flops_per_token else {}
    return {
        "seconds": seconds,
        **spent,
        "other": seconds - sum(spent.values()),
        "tokens_per_second": speed,
        "flops_per_second": flops_per_token * speed,
        "mfu": flops_per_token * speed / peak,
        **extra,
        "memory": memory(device),
    }


def stragglers(seconds_R: Sequence[float], hosts: Sequence[str]) -> list[str]:
    """A line for each rank that took more than _SLOW times the median (the lower one of an even number).

    Args:
        seconds_R: each rank's own work over an interval, without waiting for others.
        hosts: the machine of each rank.
    """
    median = statistics.median_low(seconds_R)
    return [
        f"rank {rank} on {host} took {seconds:.2f} s, {seconds / median:.1f} times the median of {median:.2f} s"
        for rank, (seconds, host) in enumerate(zip(seconds_R, hosts, strict=True))
        if seconds > _SLOW * median > 0
    ]
