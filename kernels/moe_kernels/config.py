"""Tile sizes of the Triton kernels: a plain table, no autotuner.

An autotuner would let ranks of one job pick different tiles (and so different bits), and can exhaust the memory of a
ZeRO-3 run while it probes. Every row of the table is compiled ahead of time in the tests, without a GPU.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Rows, columns and reduction depth of one program's tile; the up kernel has two accumulators of this size."""

    block_rows: int
    block_cols: int
    block_depth: int
    num_warps: int
    num_stages: int


# Ascending by rows of an expert: (rows at most, tile). 64 columns an accumulator, because widths such as 688 = 43 * 16
# lose 2.3 % to padding at 64 and 11.6 % at 128.
_HALF_PRECISION: tuple[tuple[float, TileConfig], ...] = (
    (32, TileConfig(block_rows=16, block_cols=64, block_depth=64, num_warps=4, num_stages=3)),
    (64, TileConfig(block_rows=64, block_cols=64, block_depth=64, num_warps=4, num_stages=3)),
    (float("inf"), TileConfig(block_rows=128, block_cols=64, block_depth=64, num_warps=8, num_stages=3)),
)
# fp32 multiplies exactly ("ieee"), without tensor cores: tiles are small because operands are twice as large.
_FULL_PRECISION: tuple[tuple[float, TileConfig], ...] = (
    (32, TileConfig(block_rows=16, block_cols=32, block_depth=32, num_warps=4, num_stages=2)),
    (float("inf"), TileConfig(block_rows=64, block_cols=32, block_depth=32, num_warps=8, num_stages=2)),
)


def tile_config(rows: int, *, experts: int, itemsize: int) -> TileConfig:
    """The tile for M = ``rows`` routed rows over E ``experts`` and operands of ``itemsize`` bytes."""
    table = _HALF_PRECISION if itemsize <= 2 else _FULL_PRECISION
    return next(tile for most, tile in table if rows <= most * experts)


def all_configs() -> list[tuple[int, TileConfig]]:
    """Every (itemsize, tile) that :func:`tile_config` can answer, for the ahead-of-time compile test."""
    return [(2, tile) for _, tile in _HALF_PRECISION] + [(4, tile) for _, tile in _FULL_PRECISION]


Kernel = Literal["up", "down", "down_backward", "x_gradient", "w13_gradient", "w2_gradient"]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One program's tile of a kernel: rows, columns and reduction depth, and how Triton compiles it.

    Row tiles are sorted rows, except in the two weight gradients, whose reduction runs over the rows and whose "rows"
    are those of the weight. ``up`` has two accumulators of this size.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int


def tile(
    kernel: Kernel, *, rows_per_expert: float, columns: int, depth: int, itemsize: int, arch: int | None = None
) -> Tile:
    """The tile of one kernel.

    Args:
        kernel: its name.
        rows_per_expert: M / E, the mean number of routed rows of an expert.
        columns: width of the output (F for up and down_backward, D for down and x_gradient; of the weight gradients
            the last dimension of the weight).
        depth: the length of the reduction (of the weight gradients rows_per_expert).
        itemsize: bytes of an operand's element.
        arch: compute capability, 80, 90 or 100; by default that of the current device.
    """
    if itemsize > 2:
        return Tile(block_m=64, block_n=32, block_k=32, num_warps=4, num_stages=2, group_m=8)
    return Tile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3, group_m=8)
