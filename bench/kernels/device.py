"""The machine under the benchmark: clocks, memory, names. One class for CUDA, one for CPU with the same methods."""

import gc
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[Any], object]
Prepare = Callable[[], Any]
FLUSH_BYTES = 256 * 2**20  # more than any card's L2


class Cuda:
    """The current CUDA device."""

    type = "cuda"

    def __init__(self) -> None:
        self.name: str = torch.cuda.get_device_name()
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def run(self, step: Step, prepare: Prepare, *, times: int) -> list[float]:
        """ms of each ``step(prepare())``, the preparation not counted; by events, L2 overwritten before each."""
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for start, end in marks:
            ready = prepare()
            self._flush.zero_()
            start.record()
            step(ready)
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in marks]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def allocated(self) -> int | None:
        """Bytes in tensors now."""
        return torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        """The most bytes since the last :meth:`clean`."""
        return torch.cuda.max_memory_allocated()

    def clean(self) -> None:
        """Waits, and gives back what nothing holds.

        Raises:
            RuntimeError: the CUDA context is lost.
        """
        self.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def driver(self) -> str:
        if not shutil.which("nvidia-smi"):
            return "unknown"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or "unknown"


class Cpu:
    """The CPU: wall time, no account of memory."""

    type = "cpu"

    def __init__(self) -> None:
        self.name = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"

    def run(self, step: Step, prepare: Prepare, *, times: int) -> list[float]:
        taken = []
        for _ in range(times):
            ready = prepare()
            start = time.perf_counter()
            step(ready)
            taken.append((time.perf_counter() - start) * 1e3)
        return taken

    def synchronize(self) -> None:
        pass

    def allocated(self) -> int | None:
        return None

    def peak(self) -> int | None:
        return None

    def clean(self) -> None:
        gc.collect()

    def driver(self) -> str:
        return "none"


Device = Cuda | Cpu


def median_ms(step: Step, prepare: Prepare, *, device: Device, seconds: float) -> float:
    """Median ms of as many runs as fit into ``seconds``, 3 to 100, after a quarter of them unmeasured."""
    (once,) = device.run(step, prepare, times=1)
    times = int(min(max(seconds * 1e3 / max(once, 1e-3), 3), 100))
    device.run(step, prepare, times=max(times // 4, 1))
    return statistics.median(device.run(step, prepare, times=times))
