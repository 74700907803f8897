"""Measures what of 96 MiB of weights lives from the forward of an experts layer to its backward, though their owner
lets go of them in between, as ZeRO-3 does. Prints one JSON line for each path, and for a loop over ``w[e]``.

A process of its own, whose allocator gives every freed buffer back at once.

    MALLOC_MMAP_THRESHOLD_=65536 python tests/kernels/pinned_weights.py
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from moe_kernels.experts import experts_layer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

TOKENS, EXPERTS, TOP_K, HIDDEN, WIDTH = 32, 8, 2, 1024, 1024


def gathered() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w13 = torch.empty(EXPERTS, 2 * WIDTH, HIDDEN).normal_(std=0.03, generator=generator)
    return w13, torch.empty(EXPERTS, HIDDEN, WIDTH).normal_(std=0.03, generator=generator)


def loop(x: Tensor, w13: Tensor, w2: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        gate, up = (x @ w13[expert].t()).chunk(2, dim=-1)
        out = out + (weights * (index == expert)).sum(-1, keepdim=True) * ((F.silu(gate) * up) @ w2[expert].t())
    return out


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(layer: Callable[..., Tensor]) -> dict[str, float | bool]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    index = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    parameters = [nn.Parameter(w) for w in gathered()]
    layer(x, *parameters, index, weights).sum().backward()
    expected = [parameter.grad for parameter in parameters]

    for parameter in parameters:
        parameter.grad, parameter.data = None, torch.empty(0)
    before = resident()
    for parameter, w in zip(parameters, gathered(), strict=True):
        parameter.data = w
    del w
    storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in parameters]
    out = layer(x, *parameters, index, weights)
    for parameter in parameters:
        parameter.data = torch.empty(0)
    kept = resident() - before
    freed = all(storage.expired() for storage in storages)
    for parameter, w in zip(parameters, gathered(), strict=True):
        parameter.data = w
    out.sum().backward()
    equal = all(torch.equal(p.grad, grad) for p, grad in zip(parameters, expected, strict=True))
    return {"kept_mib": kept / 2**20, "freed": freed, "same_gradients": equal}


if __name__ == "__main__":
    layers = {path: partial(experts_layer, path=path) for path in ("sorted", "dense")} | {"loop": loop}
    for name, layer in layers.items():
        print(json.dumps({"layer": name} | measure(layer)), flush=True)
