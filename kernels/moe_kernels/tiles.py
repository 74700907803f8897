"""What the grouped GEMM kernels share: the product, and the map from a program to its tile.

Triton's interpreter holds bf16 as integers and multiplies those, silently; :func:`dot` widens its operands there.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function are Triton's, which mypy cannot name)

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
    """This program's expert (E past the last real tile), its first sorted row, the end of the expert's rows, and its
    column tile. GROUP_M row tiles take turns at one column tile, so that both operands are found in L2."""
    tile, col_tile = tl.swizzle2d(
        tl.program_id(0) // n_col_tiles, tl.program_id(0) % n_col_tiles, n_row_tiles, n_col_tiles, GROUP_M
    )
    expert = tl.load(tile_expert_B + tile)
    return expert, tl.load(tile_row_B + tile), tl.load(offset_E1 + tl.minimum(expert + 1, E)), col_tile


@triton.jit
def row_tile(
    tile_expert_B, tile_row_B, offset_E1, n_row_tiles, n_col_tiles, E, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr
):
    """:func:`row_tile_start` with all BLOCK_M rows of the tile instead of the first."""
    expert, row, end, col_tile = row_tile_start(
        tile_expert_B, tile_row_B, offset_E1, n_row_tiles, n_col_tiles, E, GROUP_M
    )
    return expert, row + tl.arange(0, BLOCK_M), end, col_tile
