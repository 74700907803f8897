"""Compiles every shipped tile for sm_80 and sm_90 without a GPU and prints one JSON line for each.

A process of its own, because the compiler does not work in one that has set TRITON_INTERPRET.

    python tests/kernels/compile_ahead_of_time.py
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from moe_kernels.config import TileConfig, all_configs
from moe_kernels.grouped import combine_kernel, down_kernel, up_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = {2: "bf16", 4: "fp32"}


def signature(kernel: triton.JITFunction, element: str, constants: dict[str, object]) -> dict[str, str]:
    """Argument types by the kernels' naming: ``*_ptr`` elements, capitalised suffixes index arrays, else integers."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name == "weight_ptr":
            types[name] = "*fp32"
        elif name.endswith("_ptr"):
            types[name] = f"*{element}"
        else:
            types[name] = "*i64" if re.search(r"_[A-Z]+1?$", name) else "i32"
    return types


def compile_one(kernel: triton.JITFunction, capability: int, itemsize: int, tile: TileConfig) -> dict[str, object]:
    if kernel is combine_kernel:
        constants: dict[str, object] = {"BLOCK_D": 1024}
    else:
        constants = {"BLOCK_M": tile.block_rows, "BLOCK_N": tile.block_cols, "BLOCK_K": tile.block_depth}
        constants["INTERPRETED"] = False
    types = signature(kernel, DTYPES[itemsize], constants)
    # What a launch with D and F multiples of 16 specialises to; without it there are no vector loads.
    aligned = {"x_ptr", "w13_ptr", "w2_ptr", "act_ptr", "y_ptr", "out_ptr", "stride_xt", "D", "F"}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    compiled = triton.compile(
        ASTSource(kernel, types, constants, attrs),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    resources = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "kernel": kernel.fn.__name__,
        "capability": capability,
        "itemsize": itemsize,
        "block_rows": tile.block_rows,
        "shared": compiled.metadata.shared,
        "registers": int(resources["REG"]),
        "spilled": int(resources["STACK"]) + int(resources["LOCAL"]),
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "mma": compiled.asm["ptx"].count("mma.sync"),
        "async_copies": compiled.asm["ptx"].count("cp.async"),
    }


if __name__ == "__main__":
    for capability in (80, 90):
        for itemsize, tile in all_configs():
            for kernel in (up_kernel, down_kernel):
                print(json.dumps(compile_one(kernel, capability, itemsize, tile)), flush=True)
        print(json.dumps(compile_one(combine_kernel, capability, 2, all_configs()[0][1])), flush=True)
