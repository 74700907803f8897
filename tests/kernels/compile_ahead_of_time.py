"""Compiles the layer ahead of time without a GPU: the real host code, launch by launch, at real shapes.

Prints one JSON line for each kernel that a launch compiled, with what its binary takes and what its code consists of.
A process of its own, because the compiler does not work in one that has set TRITON_INTERPRET.

    python tests/kernels/compile_ahead_of_time.py           # all kernels, and on sm_90 all tiles of the table
    python tests/kernels/compile_ahead_of_time.py --all     # all tiles and variations at all shapes, on five cards
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from unittest.mock import patch

import torch
import triton
from moe_kernels import config
from moe_kernels.backward import experts_backward_triton
from moe_kernels.config import Kernel, Tile
from moe_kernels.forward import experts_forward_triton
from moe_kernels.routing import Routing, build_routing

from bench.kernels.shapes import Shape
from bench.tune.compile_only import Launch, no_device, recorded_launches
from bench.tune.trial import table_name

LLAMA_MOE = Shape(32768, 16, 4, 4096, 688)
SMOLLM2 = Shape(8192, 48, 16, 576, 24)
DECODING = Shape(8, 16, 4, 4096, 688)
SHAPES = (
    LLAMA_MOE,
    Shape(8192, 8, 2, 4096, 1376),
    Shape(8192, 128, 8, 2048, 768),  # Qwen3-30B-A3B
    Shape(8192, 8, 2, 4096, 14336),  # Mixtral-8x7B
    Shape(8192, 64, 8, 2048, 1024),  # OLMoE
    Shape(8192, 40, 8, 1536, 512),  # Granite
    SMOLLM2,
    DECODING,
    Shape(1, 8, 2, 4096, 14336),
)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One forward and backward. Memory is mapped and never touched, so sizes are real."""

    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    fp32_weights: bool = False  # whatever the dtype
    presorted: bool = False  # rows come sorted, gate and up projections are separate tensors
    inference: bool = False  # nothing is kept, no backward
    frozen: bool = False  # only the gradient of x

    @property
    def name(self) -> str:
        flags = [name for name in ("fp32_weights", "presorted", "inference", "frozen") if getattr(self, name)]
        return " ".join([str(self.shape), *flags])

    def run(self) -> None:
        shape = self.shape
        stored = torch.float32 if self.fp32_weights else self.dtype
        x_TD = torch.empty(shape.tokens, shape.hidden, dtype=self.dtype)
        w1_EFD = torch.empty(shape.experts, shape.width * (1 if self.presorted else 2), shape.hidden, dtype=stored)
        w3_EFD = torch.empty_like(w1_EFD) if self.presorted else None
        w2_EDF = torch.empty(shape.experts, shape.hidden, shape.width, dtype=stored)
        if self.presorted:
            routing, weights_TK = Routing(top_k=1, offset_E1=torch.empty(shape.experts + 1, dtype=torch.int32)), None
        else:
            index_TK = torch.empty(shape.tokens, shape.top_k, dtype=torch.int64)
            routing, weights_TK = build_routing(index_TK, experts=shape.experts), torch.empty(index_TK.shape)
        out_TD, hidden_MG = experts_forward_triton(
            x_TD,
            w1_EFD,
            w3_EFD,
            w2_EDF,
            weights_TK=weights_TK,
            routing=routing,
            keep_hidden=not self.inference,
        )
        if not self.inference:
            experts_backward_triton(
                torch.empty_like(out_TD),
                x_TD,
                w1_EFD,
                w3_EFD,
                w2_EDF,
                hidden_MG,
                weights_TK=weights_TK,
                routing=routing,
                need_x=True,
                need_w13=not self.frozen,
                need_w2=not self.frozen,
                need_weights=not self.frozen and not self.presorted,
            )


def main(*, everything: bool) -> None:
    for arch in (80, 90, 100, 89, 120) if everything else (80, 90, 100):
        seen: set[str] = set()
        tried: set[tuple[str, Tile]] = set()
        with no_device(arch), patch("moe_kernels.routing._runs_triton", lambda device: True):
            for case in cases(arch, everything=everything):
                report(case, arch=arch, seen=seen, tried=tried)
            # Tiles of the table that none of these shapes has. Registers and shared memory are tightest on sm_90.
            for row in config.shipped_table() if everything or arch == 90 else ():
                if row.arch == config.family(arch) and (row.kernel, row.tile) not in tried:
                    dtype = torch.float32 if row.itemsize == 4 else torch.bfloat16
                    case = Case(shape=LLAMA_MOE, dtype=dtype)
                    report(case, arch=arch, seen=seen, tried=tried, tile=(row.kernel, row.tile))


def cases(arch: int, *, everything: bool) -> Iterator[Case]:
    if everything:
        for shape in SHAPES:
            for dtype in DTYPES:
                yield from variations(Case(shape=shape, dtype=dtype))
        return
    yield Case(shape=LLAMA_MOE)
    if arch != 100:
        yield Case(shape=LLAMA_MOE, dtype=torch.float32)
    if arch == 90:
        yield Case(shape=SMOLLM2)
        yield Case(shape=DECODING, fp32_weights=True)
        yield Case(shape=LLAMA_MOE, dtype=torch.float16, presorted=True)


def variations(case: Case) -> Iterator[Case]:
    yield case
    yield replace(case, inference=True)
    yield replace(case, frozen=True)
    yield replace(case, presorted=True)
    if case.shape.width < 2048:  # they are cast, which touches their memory
        yield replace(case, fp32_weights=True)


def report(
    case: Case,
    *,
    arch: int,
    seen: set[str],
    tried: set[tuple[str, Tile]],
    tile: tuple[Kernel, Tile] | None = None,
) -> None:
    with ExitStack() as stack:
        if tile is not None:
            stack.enter_context(config.forced(*tile))
        launches = stack.enter_context(recorded_launches(run=False))
        try:
            case.run()
        except triton.CompilationError as error:
            print(json.dumps({"arch": arch, "case": case.name, "error": str(error)}), flush=True)
    for launch in launches:
        used = tile_of(launch)
        if used is not None:
            tried.add((str(table_name(launch)), used))
        if launch.compiled.hash not in seen:
            seen.add(launch.compiled.hash)
            line = {"kernel": launch.name, "arch": arch, "dtype": DTYPES[case.dtype], "case": case.name}
            line |= {"table": table_name(launch), "tile": None if used is None else asdict(used)}
            print(json.dumps(line | {"grid": launch.grid} | asdict(launch.resources)), flush=True)


def tile_of(launch: Launch) -> Tile | None:
    """The tile that the host code was given."""
    if table_name(launch) is None:
        return None
    given = launch.options
    return Tile(
        block_m=given["BLOCK_M"],
        block_n=given["BLOCK_N"],
        block_k=given["BLOCK_K"],
        num_warps=given["num_warps"],
        num_stages=given["num_stages"],
        group_m=given["GROUP_M"],
    )


if __name__ == "__main__":
    main(everything="--all" in sys.argv[1:])
