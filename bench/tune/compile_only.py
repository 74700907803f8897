"""Runs the real host code with every launch recorded, and where wished compiled instead of run: no GPU is needed.

A launch compiles exactly what it would on the device, because Triton specialises on the arguments (alignment of
pointers and strides, integers equal to 1) and not on their contents. Tensors may therefore be CPU memory that nothing
has written (``torch.empty`` maps pages lazily) at the real sizes.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

# Bytes that one program may use on a card of this compute capability (CUDA C programming guide, table 30).
SHARED_MEMORY_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class _NoDevice(DriverBase):  # type: ignore[misc]  # Triton has no types
    """A Triton driver for a device that isn't there: enough to compile, nothing to run."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        arch: int = self.target.arch  # compiled kernels are cached by device, and so by architecture
        return arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs on a device that isn't there")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, by its binary (``cuobjdump -res-usage``), and what its PTX consists of.

    Bytes of a thread (``spilled``) and of a program (``shared``), then numbers of instructions. ``atomics`` are those
    whose order can show in a result: not the integer counts that ``tl.histogram`` keeps in shared memory.
    """

    registers: int
    spilled: int
    shared: int
    wgmma: int
    mma: int
    tcgen05: int
    async_copies: int
    bulk_copies: int
    vector_loads: int
    atomics: int
    double: int

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.shared} bytes shared"

    def refusal(self, arch: int) -> str | None:
        """Why a card of compute capability ``arch`` cannot run the kernel, or only slowly; None if it can."""
        limit = SHARED_MEMORY_LIMIT.get(arch, 101_376)
        if self.shared > limit:
            return f"{self.shared} bytes of shared memory, the card has {limit}"
        return f"{self.spilled} bytes of registers spilled" if self.spilled else None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of one kernel: enough to look at its code, and on a device to run it again."""

    function: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...]
    compiled: CompiledKernel

    @property
    def name(self) -> str:
        return str(self.function.fn.__name__)

    def __call__(self) -> None:
        self.function[self.grid](*self.arguments, **self.options)

    @cached_property
    def resources(self) -> Resources:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(self.compiled.asm["cubin"])
            cubin.flush()
            command = [str(_CUOBJDUMP), "-res-usage", cubin.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        ptx = self.compiled.asm["ptx"]

        def count(pattern: str) -> int:
            return len(re.findall(pattern, ptx))

        return Resources(
            registers=used["REG"],
            spilled=used["STACK"] + used["LOCAL"],
            shared=self.compiled.metadata.shared,
            wgmma=count(r"\bwgmma\.mma_async"),
            mma=count(r"\bmma\.sync"),
            tcgen05=count(r"\btcgen05\.mma"),
            async_copies=count(r"\bcp\.async\.c[ag]"),
            bulk_copies=count(r"\bcp\.async\.bulk\.tensor"),
            vector_loads=count(r"\bld\.global\S*\.v[248]"),
            atomics=count(r"\b(?:atom|red)\.(?!shared\.add\.u32)"),
            double=count(r"\.f64\b"),
        )


@contextmanager
def no_device(arch: int) -> Iterator[None]:
    """Triton believes that the current device is one of compute capability ``arch``."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(_NoDevice(arch))
    try:
        yield
    finally:
        config._active = before


@contextmanager
def recorded_launches(*, run: bool) -> Iterator[list[Launch]]:
    """Collects the launches inside the block, in order; without ``run`` they are compiled only."""
    launches: list[Launch] = []
    launch = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> CompiledKernel:
        compiled = launch(self, *args, grid=grid, warmup=warmup or not run, **options)
        size = grid(dict(zip(self.arg_names, args, strict=False)) | options) if callable(grid) else grid
        launches.append(Launch(function=self, arguments=args, options=options, grid=tuple(size), compiled=compiled))
        return compiled

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = launch
