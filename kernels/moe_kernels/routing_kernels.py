"""Rows sorted by expert without a general sort: count, then place; and the map from row tiles to experts.

    count   counts[n, e] = rows of expert e among the rows of tile n
    place   sorted position = start of the expert + its rows in earlier tiles + its earlier rows in this tile
    tiles   row tile -> expert and first row

``count`` and ``place`` are all that :func:`moe_kernels.routing.build_routing` launches. They read the indices twice,
write the 4 N (E+1) bytes of counts and 8 M bytes. Every program of ``place`` reads all counts, from L2: 4 N^2 (E+1)
bytes with N <= 128 up to M = 2^19, 1 MB at E = 16 and 8 MB at E = 128, about as long as the gap before a third launch
that would sum them. Integers only: the same rows give the same bits.

Shapes: T tokens, K top-k, M = T*K routed rows ("flat" t*K + k, or sorted by expert), N tiles of TILE_ROWS flat rows,
C rows of a tile that are placed at a time, E experts, B row tiles. Index E stands for the experts that are absent.
"""

import triton
import triton.language as tl


@triton.jit
def _load_expert(index_TK, flat_C, stride_t, stride_k, M, K, E):
    """The experts of these flat rows; E for absent ones and for rows past M, which lie behind all that are counted."""
    token_C, k_C = (flat_C // K).to(tl.int64), (flat_C % K).to(tl.int64)
    expert_C = tl.load(index_TK + token_C * stride_t + k_C * stride_k, mask=flat_C < M, other=-1)
    return tl.where((expert_C >= 0) & (expert_C < E), expert_C, E).to(tl.int32)


@triton.jit(do_not_specialize=["M"])
def count_kernel(
    index_TK,  # (T, K), any strides, int32 or int64
    count_NE1,  # (N, E+1), contiguous
    stride_t,
    stride_k,
    M,
    K,
    E,
    TILE_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two > E
):
    tile = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    flat_C = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    count_E = tl.histogram(_load_expert(index_TK, flat_C, stride_t, stride_k, M, K, E), BLOCK_E)
    tl.store(count_NE1 + tile * (E + 1) + expert_E, count_E, mask=expert_E <= E)


@triton.jit(do_not_specialize=["M", "N"])
def place_kernel(
    index_TK,  # (T, K), any strides, int32 or int64
    count_NE1,  # (N, E+1), contiguous
    offset_E1,  # (E+1,)
    flat_M,  # (M,)
    inverse_TK,  # (T, K), contiguous
    stride_t,
    stride_k,
    M,
    K,
    E,
    N,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # divides TILE_ROWS
    BLOCK_E: tl.constexpr,  # power of two > E
    BLOCK_N: tl.constexpr,  # tiles whose counts are read at a time
):
    tile = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    all_E = tl.zeros((BLOCK_E,), dtype=tl.int32)
    earlier_E = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for first in range(0, N, BLOCK_N):
        tile_N = first + tl.arange(0, BLOCK_N)
        mask_NE = (tile_N < N)[:, None] & (expert_E <= E)[None, :]
        count_NE = tl.load(count_NE1 + tile_N[:, None] * (E + 1) + expert_E[None, :], mask=mask_NE, other=0)
        all_E += tl.sum(count_NE, axis=0)
        earlier_E += tl.sum(tl.where((tile_N < tile)[:, None], count_NE, 0), axis=0)
    offset_E = tl.cumsum(all_E) - all_E
    if tile == 0:
        tl.store(offset_E1 + expert_E, offset_E, mask=expert_E <= E)

    next_E = offset_E + earlier_E
    row_C = tl.arange(0, BLOCK_C)
    for first in range(0, TILE_ROWS, BLOCK_C):
        flat_C = tile * TILE_ROWS + first + row_C
        expert_C = _load_expert(index_TK, flat_C, stride_t, stride_k, M, K, E)
        before_CC = (expert_C[None, :] == expert_C[:, None]) & (row_C[None, :] < row_C[:, None])
        sorted_C = tl.gather(next_E, expert_C, 0) + tl.sum(before_CC.to(tl.int32), axis=1)
        tl.store(flat_M + sorted_C, flat_C, mask=flat_C < M)
        tl.store(inverse_TK + flat_C, sorted_C, mask=flat_C < M)
        next_E += tl.histogram(expert_C, BLOCK_E)


@triton.jit(do_not_specialize=["B"])
def tiles_kernel(
    offset_E1,  # (E+1,)
    tile_expert_B,  # (B,)
    tile_row_B,  # (B,)
    E,
    B,
    TILE_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two >= E
):
    tile_B = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    expert_E = tl.arange(0, BLOCK_E)
    start_E = tl.load(offset_E1 + expert_E, mask=expert_E < E, other=0)
    end_E = tl.load(offset_E1 + expert_E + 1, mask=expert_E < E, other=0)
    tile_end_E = tl.cumsum((end_E - start_E + TILE_ROWS - 1) // TILE_ROWS)
    past_BE = tile_end_E[None, :] <= tile_B[:, None]
    expert_B = tl.minimum(tl.sum(past_BE.to(tl.int32), axis=1), E)
    first_tile_B = tl.max(tl.where(past_BE, tile_end_E[None, :], 0), axis=1)
    row_B = tl.load(offset_E1 + expert_B) + (tile_B - first_tile_B) * TILE_ROWS
    tl.store(tile_expert_B + tile_B, expert_B, mask=tile_B < B)
    tl.store(tile_row_B + tile_B, row_B, mask=tile_B < B)
