"""The machine that an evaluation ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def machine(device: str) -> dict[str, Any]:
    """The processor, its cores, and the threads that torch used."""
    import torch

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    description = {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device == "cuda":
        description["gpu"] = torch.cuda.get_device_name()
    return description
