"""Chooses the CPU path of an experts layer: one GEMM per expert, or all experts for every token.

Shapes: T tokens, D hidden, F width of one expert, E experts, K top-k.
"""

from typing import Literal

import torch

CpuPath = Literal["sorted", "dense"]

# In units of one hidden unit of width, a routed row costs the sorted path F for its FLOPs and an overhead for moving D
# elements in and out and for GEMMs too narrow to run at full speed; it costs the dense path (E/K) * F and no overhead.
# The faster the GEMMs of a dtype, the more units the same overhead is worth. Fitted to `bench/kernels/cpu_layer.py
# --crossover`.
OVERHEAD_FULL_PRECISION = 16
OVERHEAD_HALF_PRECISION = 40


def choose_regime(experts: int, top_k: int, *, width: int, tokens: int, dtype: torch.dtype) -> CpuPath:
    """The faster path on CPU, by arithmetic intensity.

    Args:
        experts: E.
        top_k: K.
        width: F, the width of one expert.
        tokens: T; with fewer routed rows than experts the dense path would read weights that no token chose.
        dtype: the dtype of the GEMMs.

    Returns:
        ``"dense"`` (:mod:`moe_kernels.dense_path`) for very narrow or nearly all experts, otherwise ``"sorted"``
        (:mod:`moe_kernels.sorted_path`).
    """
    if tokens * top_k < experts:
        return "sorted"
    overhead = OVERHEAD_HALF_PRECISION if dtype.itemsize <= 2 else OVERHEAD_FULL_PRECISION
    return "dense" if experts * width <= top_k * (width + overhead) else "sorted"
