"""Tile sizes of the Triton kernels: a plain table, no autotuner.

An autotuner would let ranks of one job pick different tiles (and so different bits), and can exhaust the memory of a
ZeRO-3 run while it probes. Every row of the table is compiled ahead of time in the tests, without a GPU.
"""

from dataclasses import dataclass


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
