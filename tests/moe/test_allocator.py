"""Large buffers stay in the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from tasks.moe import allocator
if sys.argv[1] == "keep":
    allocator.keep_buffers()
def fill():
    return torch.ones(1 << 24).sum()
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_buffer_of_64_mib_is_faulted_in_once_and_not_at_every_use() -> None:
    faults = {}
    for mode in ("keep", "plain"):
        done = subprocess.run([sys.executable, "-c", COUNT, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    assert faults["keep"] < faults["plain"] / 10, faults


RELEASE = """
import torch
from tasks.moe import allocator
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
allocator.keep_buffers()
first = torch.ones(1 << 24)
last = torch.ones(1 << 22)
del first
before = resident()
allocator.release()
print(before - resident(), last.sum().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_kept_buffers_can_be_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", RELEASE], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[0]) > 60_000_000
