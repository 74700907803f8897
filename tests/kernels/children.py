"""Processes of their own: Python with this checkout's ``moe_kernels`` and ``bench``, and ranks of a process group."""

import os
import subprocess
import sys
from pathlib import Path

import moe_kernels

HERE = Path(__file__).parent
PATHS = [str(Path(moe_kernels.__file__).parents[1]), str(HERE.parents[1])]


def run_python(*args: str, cwd: Path = HERE, **environment: str) -> str:
    """What it printed; fails with the end of its output unless it exits with 0. TRITON_INTERPRET isn't inherited."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([*PATHS, *filter(None, [inherited.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return ran.stdout


def join(rank: int, folder: Path, *, ranks: int) -> None:
    """Meet the other ranks through a file in ``folder``, and give DeepSpeed their process group."""
    import deepspeed.ops
    import torch.distributed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
