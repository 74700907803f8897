"""Keep large buffers between uses on a CPU.

glibc maps every buffer above 32 MiB anew, and the kernel fills it with zeros page by page: the logits of two windows
over a vocabulary of 49152 are 200 MB, several times a step. Kept in the heap they cost a fifth (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_TWO_GIB = 2**31 - 1


def keep_buffers() -> None:
    """Tell this process's malloc to map nothing, and to give back only what exceeds 2 GiB; nothing without glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _TWO_GIB)


def release() -> None:
    """Give back what is free at this moment, before something as large as a layer comes into memory."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
