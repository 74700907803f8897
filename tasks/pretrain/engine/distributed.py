"""The process group of a run, as DeepSpeed wants it."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def join(workspace: Path) -> tuple[int, int, torch.device]:
    """Join the process group: nccl with CUDA, gloo without. Returns (rank, world size, device).

    A single process meets itself in memory and needs no port; several find each other through torchrun's variables.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str((workspace / "torch_extensions").resolve()))
    import torch

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls old names
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend)
    else:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # torch exports it implicitly
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def gather(value: Any, *, world_size: int) -> list[Any]:
    """The value of every rank, by rank; all ranks must call it. One process needs no group."""
    import torch

    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(values, value)
    return values


def leave() -> None:
    """Leave the process group, if there is one, and let DeepSpeed forget the groups that it made of it."""
    from deepspeed import comm

    if comm.is_initialized():
        comm.destroy_process_group()
