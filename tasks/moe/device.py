"""The device that this machine computes on, and whether it is fast in bfloat16."""

from __future__ import annotations

from pathlib import Path


def default() -> str:
    """`cuda` where torch sees a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bfloat16(device: str) -> bool:
    """True if the device type, `cuda` or `cpu`, multiplies in bfloat16 itself."""
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else cpu_has_bfloat16()


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True if the processor has bfloat16 products; without them oneDNN's bfloat16 is slower than float32."""
    if not cpuinfo.exists():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())
