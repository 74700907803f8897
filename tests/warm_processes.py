"""Processes that start warm: a server imports torch, transformers and DeepSpeed once, and each is a fork of it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_PRELOAD = [
    "torch.distributed",
    "deepspeed.runtime.engine",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
]


class Ended(NamedTuple):
    returncode: int
    """Negative for a signal."""
    stdout: str
    stderr: str


def spawn(function: Callable[..., None], args: tuple[Any, ...], *, nprocs: int = 2) -> None:
    """Call function(rank, *args) in `nprocs` processes; raise if one fails."""
    import torch

    multiprocessing.set_forkserver_preload(_PRELOAD)
    torch.multiprocessing.start_processes(function, args, nprocs=nprocs, start_method="forkserver")


def run(function: Callable[..., None], *args: Any, timeout: float = 300) -> Ended:
    """Call a function in a process of its own, in this one's working directory, and return how it ended."""
    multiprocessing.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "stdout", Path(folder) / "stderr"
        process = multiprocessing.get_context("forkserver").Process(target=_call, args=(out, err, function, args))
        process.start()
        process.join(timeout)
        assert process.exitcode is not None, f"still runs after {timeout} seconds"
        return Ended(process.exitcode, out.read_text(), err.read_text())


def _call(out: Path, err: Path, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    try:
        function(*args)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
