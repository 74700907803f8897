"""Device functions that the grouped GEMM kernels share: the product, and the map from a program to its tile.

Triton's interpreter holds bf16 as integers and multiplies those, silently; :func:`dot` widens its operands there.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, INTERPRETED: tl.constexpr):
    """``acc + a @ b`` in fp32, never in TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def row_tile_start(tile_expert_B, tile_row_B, offset_E1, n_row_tiles, n_col_tiles, E, GROUP_M: tl.constexpr):
    """:func:`row_tile_at` for a program that computes one tile, its own."""
    return row_tile_at(tl.program_id(0), tile_expert_B, tile_row_B, offset_E1, n_row_tiles, n_col_tiles, E, GROUP_M)


@triton.jit
def row_tile_at(tile, tile_expert_B, tile_row_B, offset_E1, n_row_tiles, n_col_tiles, E, GROUP_M: tl.constexpr):
    """A tile's expert (E past the last real one), its first sorted row, the end of the expert's rows, and its column
    tile. GROUP_M row tiles take turns at one column tile, so that both operands are found in L2."""
    row_tile, col_tile = tl.swizzle2d(tile // n_col_tiles, tile % n_col_tiles, n_row_tiles, n_col_tiles, GROUP_M)
    expert = tl.load(tile_expert_B + row_tile)
    return expert, tl.load(tile_row_B + row_tile), tl.load(offset_E1 + tl.minimum(expert + 1, E)), col_tile
