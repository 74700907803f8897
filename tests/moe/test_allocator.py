"""Large buffers stay in the process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from tasks.moe import allocator
from tests import warm_processes


def _faults() -> int:
    """Page faults of four uses of a buffer of 64 MiB, after a first one."""
    torch.ones(1 << 24).sum()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _measure() -> None:
    plain = _faults()
    allocator.keep_buffers()
    print(plain, _faults())
    first = torch.ones(1 << 24)
    last = torch.ones(1 << 22)
    del first
    before = _resident()
    allocator.release()
    print(before - _resident(), last.sum().item())


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_buffer_of_64_mib_is_faulted_in_once_and_not_at_every_use_and_can_be_given_back() -> None:
    plain, kept, given_back, _ = map(float, warm_processes.run(_measure).stdout.split())
    assert kept < plain / 10
    assert given_back > 60_000_000
