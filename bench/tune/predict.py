"""Arithmetic of tiles: what a kernel computes at a shape, which tiles it might have, and what time each would take.

The model orders candidates; it is no substitute for a measurement. A kernel takes the longest of four times (products
with their padding, at the rate that shared memory feeds them; operands from L2; all tensors once from HBM; latency of
a program's steps) and a tenth of the other three, scaled by how unevenly its programs fill the multiprocessors, plus
that part of the epilogue which no other program on the multiprocessor hides.

Shapes: T tokens, D hidden, F width of one expert, E experts, K top-k, M = T*K routed rows.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from moe_kernels.config import Kernel, Tile

from bench.kernels.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """The product of one expert in one kernel: rows x columns, summed over depth.

    ``outer`` counts the elements per row and column that the epilogue reads and writes; ``routed`` says whether the
    rows are those of the routing, whose number differs from expert to expert.
    """

    rows: float
    columns: int
    depth: float
    outer: int
    accumulators: int = 1
    routed: bool = True


def gemm(kernel: Kernel, shape: Shape) -> Gemm:
    """What ``kernel`` computes for each expert at ``shape``."""
    rows, model_dim, width = shape.rows_per_expert, shape.hidden, shape.width
    match kernel:
        case "up":
            return Gemm(rows=rows, columns=width, depth=model_dim, outer=3, accumulators=2)
        case "down":
            return Gemm(rows=rows, columns=model_dim, depth=width, outer=1)
        case "down_backward":
            return Gemm(rows=rows, columns=width, depth=model_dim, outer=5)
        case "x_gradient":
            return Gemm(rows=rows, columns=model_dim, depth=2 * width, outer=1)
        case "w13_gradient":
            return Gemm(rows=2 * width, columns=model_dim, depth=rows, outer=1, routed=False)
        case "w2_gradient":
            return Gemm(rows=model_dim, columns=width, depth=rows, outer=1, routed=False)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Rates of a card, per second; ``mma_share`` is that of the peak which warp-level mma (tiles below 64 rows)
    reaches."""

    processors: int
    half_flops: float
    full_flops: float
    hbm_bytes: float
    l2_bytes: float
    mma_share: float


# By architecture of the table: A100, H100 SXM, B200. L2 rates are of microbenchmarks (A100, H100) and a guess (B200).
CARDS = {
    80: Card(processors=108, half_flops=312e12, full_flops=19.5e12, hbm_bytes=2.0e12, l2_bytes=4.0e12, mma_share=1.0),
    90: Card(processors=132, half_flops=989e12, full_flops=66.9e12, hbm_bytes=3.35e12, l2_bytes=5.5e12, mma_share=0.6),
    100: Card(processors=148, half_flops=2250e12, full_flops=75e12, hbm_bytes=8.0e12, l2_bytes=10e12, mma_share=0.3),
}
# Shared memory a program may use: of 80 what the smallest card of that family has.
MEMORY = {80: 101_376, 90: 232_448, 100: 232_448}
_LATENCY = 0.8e-6  # seconds from a load of HBM to its use
_START = 2e-6  # seconds a program takes to start and to store its tile


def candidates(work: Gemm, *, itemsize: int, arch: int) -> Iterator[Tile]:
    """Tiles worth compiling: their operands fit in shared memory; whether accumulators fit in registers, the compiler
    tells."""
    sides: Iterable[tuple[int, int]] = product((16, 32, 64, 128, 256), (32, 64, 128, 256))
    depths, stages = ((32, 64) if arch == 80 else (64, 128)), [3, 4, 5]
    sums = 128  # fp32 of a thread: more would spill
    if itemsize > 2:  # no tensor cores: operands pass through registers too
        sides, depths, stages, sums = product((16, 32, 64, 128), (32, 64, 128)), (16, 32), [2, 3], 64
    for (rows, columns), depth, count, warps in product(sides, depths, stages, (4, 8)):
        elements = rows * columns * work.accumulators
        operands = operand_bytes(rows, columns, depth, work=work, itemsize=itemsize)
        fits = operands * count <= MEMORY[arch]
        if fits and (warps == 4 or elements >= 64 * 128) and elements <= sums * 32 * warps:
            yield Tile(block_m=rows, block_n=columns, block_k=depth, num_warps=warps, num_stages=count, group_m=8)


def operand_bytes(rows: int, columns: int, depth: int, *, work: Gemm, itemsize: int) -> int:
    """What one step of a program reads."""
    return (rows + columns * work.accumulators) * depth * itemsize


def _peak(tile: Tile, work: Gemm, *, itemsize: int, arch: int) -> float:
    """FLOP/s that the card's multipliers reach with the operands they are given."""
    card, width = CARDS[arch], tile.block_n * work.accumulators
    if itemsize > 2:  # no tensor cores: a thread's n x n sums take n * n multiply-adds and n / 2 wide loads a step
        sums = tile.block_m * width / (32 * tile.num_warps)
        share: float = sums / (sums + sums**0.5 / 2)
        return card.full_flops * share
    if tile.block_m < 64:
        return card.half_flops * card.mma_share
    if arch != 90:
        return card.half_flops
    # Bytes of shared memory a cycle at full rate: wgmma reads 64 + 4096 / N, copies write 4096 / M + 4096 / N.
    return card.half_flops * min(1.0, 128 / (64 + 4096 / width + 4096 / tile.block_m + 4096 / width))


def seconds(
    kernel: Kernel, tile: Tile, shape: Shape, *, itemsize: int, arch: int, registers: int = 0, shared: int = 0
) -> float:
    """The time the model gives ``kernel`` at ``shape``.

    Args:
        itemsize: bytes of an element.
        arch: 80, 90 or 100.
        registers: of a thread, once compiled; else they are taken to be accumulators and 64 more.
        shared: bytes of a program, once compiled; else the operands of all stages.
    """
    card, work = CARDS[arch], gemm(kernel, shape)
    rows = shape.experts * work.rows
    experts, row_tiles = shape.experts, float(math.ceil(work.rows / tile.block_m))
    if work.routed:  # only experts with rows count, and half a tile of each is padding
        experts = max(1, round(shape.experts * -math.expm1(-work.rows)))
        row_tiles = max(1.0, rows / experts / tile.block_m + 0.5)
    programs = math.ceil(experts * row_tiles) * math.ceil(work.columns / tile.block_n)
    halves = 2 if kernel == "x_gradient" else 1
    steps = halves * math.ceil(work.depth / halves / tile.block_k)

    flops = programs * steps * 2 * tile.block_m * tile.block_n * tile.block_k * work.accumulators
    peak = _peak(tile, work, itemsize=itemsize, arch=arch)
    operands = operand_bytes(tile.block_m, tile.block_n, tile.block_k, work=work, itemsize=itemsize)
    epilogue = work.outer * rows * work.columns * itemsize
    once = epilogue + work.depth * (rows + experts * work.accumulators * work.columns) * itemsize
    uneven = math.ceil(programs / card.processors) * card.processors / programs
    times = (flops / peak, programs * steps * operands / card.l2_bytes, once / card.hbm_bytes)

    registers = registers or 64 + tile.block_m * tile.block_n * work.accumulators // (32 * tile.num_warps)
    shared = shared or operands * tile.num_stages
    memory = 167_936 if arch == 80 else 233_472  # of a multiprocessor, for all its programs
    resident = max(1, min(65536 // (registers * 32 * tile.num_warps), memory // shared, 64 // tile.num_warps))
    turns = math.ceil(programs / (card.processors * resident))
    latency = turns * (steps * _LATENCY / max(1, tile.num_stages - 1) + _START)
    busy = [*(time * uneven for time in times), latency]
    # Nothing overlaps wholly: of two tiles that are bound by the same, the one wins that has less of the rest.
    return max(busy) + 0.1 * (sum(busy) - max(busy)) + epilogue / card.hbm_bytes / resident
