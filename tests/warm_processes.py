"""Processes that start warm: a server imports torch, transformers and DeepSpeed once, and each is a fork of it."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
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


def spawn_ranks(function: Callable[..., None], args: tuple[Any, ...], *, nprocs: int = 2) -> None:
    """As `spawn`, with the variables of torchrun in each process."""
    spawn(_as_rank, (nprocs, free_port(), function, args), nprocs=nprocs)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def set_rank(rank: int, *, world_size: int, port: int) -> None:
    """Set the variables of torchrun in this process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def _as_rank(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    set_rank(rank, world_size=world_size, port=port)
    function(rank, *args)


class Started:
    """A function that runs in a process of its own, in this one's working directory."""

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        multiprocessing.set_forkserver_preload(_PRELOAD)
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_call, args=(*self._streams, function, args))
        self.process.start()

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._streams[0].read_text() if self._streams[0].exists() else ""

    def wait(self, timeout: float = 300) -> Ended:
        """Return how it ended, once."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still runs after {timeout} seconds"
        with self._folder:
            return Ended(self.process.exitcode, *(path.read_text() for path in self._streams))


def run(function: Callable[..., None], *args: Any, timeout: float = 300) -> Ended:
    """Call a function in a process of its own, in this one's working directory, and return how it ended."""
    return Started(function, *args).wait(timeout)


def print_imports(module: str, packages: Sequence[str]) -> None:
    """Import a module where nothing of these packages is loaded yet, and print as JSON what is loaded of them then."""
    assert not _loaded(packages), _loaded(packages)
    importlib.import_module(module)
    print(json.dumps(_loaded(packages)))


def _loaded(packages: Sequence[str]) -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in packages]


def _call(out: Path, err: Path, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    try:
        function(*args)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
