"""The Triton kernels of the forward. No atomics: equal inputs give equal bits.

    up       hidden[m] = [Wgate[e] x[token[m]] | Wup[e] x[token[m]]]        one pass over x for both halves
             act[m]    = silu(gate[m]) * up[m]                              in fp32, in the same program
    down     y[m]      = W2[e] act[m]
    combine  out[t]    = sum_k weight[t, k] * y[inverse[t, k]]              in fp32, in the order of k

Rows and columns past the edge of a tile are clamped to the last real one instead of masked: the product has
independent rows and columns, and those are not stored. Only the reduction is masked, on both operands. With ``TMA`` an
operand is a tensor descriptor, whose loads are zero past every edge and take no registers for addresses.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M = T*K routed rows sorted by expert, B
row tiles. Index arrays: see ``routing.py``. Row and expert offsets are int64: M*D passes 2^31 on real batches.
"""

import triton
import triton.language as tl

from .tiles import dot, row_tile_at, row_tile_start


@triton.jit(do_not_specialize=["n_row_tiles"])
def up_kernel(
    x_ptr,  # (T, D), unit stride along D
    w13_ptr,  # (E, F, D), strides (stride_we, D, 1): gate rows, up rows up_offset elements further; TMA: (E, 2, F, D)
    hidden_ptr,  # (M, G), contiguous, or None: nothing is kept
    act_ptr,  # (M, F), contiguous
    flat_M,  # (M,), or None: row m is token m
    tile_expert_B,  # (B,)
    tile_row_B,  # (B,)
    offset_E1,  # (E + 1,)
    n_row_tiles,
    n_col_tiles,
    stride_xt,
    stride_we,
    up_offset,
    D,
    F,
    E,
    K,
    ALIGN_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    expert, row, end, col_tile = row_tile_start(
        tile_expert_B, tile_row_B, offset_E1, n_row_tiles, n_col_tiles, E, GROUP_M
    )
    if expert >= E:
        return
    F = F // ALIGN_F * ALIGN_F  # by itself the compiler sees multiples of 16 only, and F = 24 in single elements
    depth_K = tl.arange(0, BLOCK_K)
    token_M = tl.minimum(row + tl.arange(0, BLOCK_M), end - 1)
    if flat_M is not None:
        token_M = tl.load(flat_M + token_M) // K
    x_ptrs = x_ptr + token_M.to(tl.int64)[:, None] * stride_xt + depth_K[None, :]
    # Gate and up columns side by side in one tile: a product 2 * BLOCK_N wide reads x from shared memory once.
    col = col_tile * BLOCK_N
    half_G = tl.arange(0, 2 * BLOCK_N) // BLOCK_N
    col_G = tl.minimum(col + tl.arange(0, 2 * BLOCK_N) % BLOCK_N, F - 1)
    if not TMA:
        w13_row_G = expert.to(tl.int64) * stride_we + half_G * up_offset + col_G.to(tl.int64) * D
        w13_ptrs = w13_ptr + w13_row_G[:, None] + depth_K[None, :]
    hidden_MG = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        mask_1K = (depth_K < D - start)[None, :]
        x_MK = tl.load(x_ptrs, mask=mask_1K, other=0.0)
        x_ptrs += BLOCK_K
        if TMA:
            w13_GK = w13_ptr.load([expert, 0, col, start]).reshape(2 * BLOCK_N, BLOCK_K)
        else:
            w13_GK = tl.load(w13_ptrs, mask=mask_1K, other=0.0)
            w13_ptrs += BLOCK_K
        hidden_MG = dot(x_MK, w13_GK.T, hidden_MG, INTERPRETED)
    # The left and the right columns are written one after the other: together they would not fit in registers.
    gate_MN2, up_MN2 = hidden_MG.reshape(BLOCK_M, 2, 2, BLOCK_N // 2).permute(0, 3, 2, 1).split()
    gate_left, gate_right = gate_MN2.split()
    up_left, up_right = up_MN2.split()
    if hidden_ptr is not None:
        hidden_ptr += row.to(tl.int64) * 2 * F
    act_ptr += row.to(tl.int64) * F
    _store_swiglu(gate_left, up_left, hidden_ptr, act_ptr, end - row, F, col, BLOCK_M, BLOCK_N // 2)
    _store_swiglu(gate_right, up_right, hidden_ptr, act_ptr, end - row, F, col + BLOCK_N // 2, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _store_swiglu(gate_MN, up_MN, hidden_ptr, act_ptr, rows, F, col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes ``[gate | up]``, where it is kept, and silu(gate) * up, the pointers being those of the tile's row."""
    row_M1 = tl.arange(0, BLOCK_M)[:, None]
    col_1N = col + tl.arange(0, BLOCK_N)[None, :]
    mask_MN = (row_M1 < rows) & (col_1N < F)
    if hidden_ptr is not None:
        hidden_ptrs = hidden_ptr + (row_M1 * 2 * F + col_1N)
        tl.store(hidden_ptrs, gate_MN.to(hidden_ptr.dtype.element_ty), mask=mask_MN)
        tl.store(hidden_ptrs + F, up_MN.to(hidden_ptr.dtype.element_ty), mask=mask_MN)
    act_MN = gate_MN * tl.sigmoid(gate_MN) * up_MN
    tl.store(act_ptr + (row_M1 * F + col_1N), act_MN.to(act_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit(do_not_specialize=["n_row_tiles"])
def down_kernel(
    act_ptr,  # (M, F), contiguous; with TMA a descriptor
    w2_ptr,  # (E, D, F), contiguous; with TMA a descriptor
    y_ptr,  # (M, D), contiguous
    tile_expert_B,  # (B,)
    tile_row_B,  # (B,)
    offset_E1,  # (E + 1,)
    n_row_tiles,
    n_col_tiles,
    D,
    F,
    E,
    ALIGN_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program a tile, or with PERSISTENT as many programs as run at once, which compute tile after tile and load
    the next while they write the last: the reduction over F is short."""
    if PERSISTENT:  # no tiles past the last real one
        expert_E = tl.arange(0, BLOCK_E)
        begin_E = tl.load(offset_E1 + expert_E, mask=expert_E < E, other=0)
        end_E = tl.load(offset_E1 + expert_E + 1, mask=expert_E < E, other=0)
        n_row_tiles = tl.sum((end_E - begin_E + BLOCK_M - 1) // BLOCK_M)
    F = F // ALIGN_F * ALIGN_F
    depth_K = tl.arange(0, BLOCK_K)
    row_M = tl.arange(0, BLOCK_M)
    for tile in tl.range(tl.program_id(0), n_row_tiles * n_col_tiles, tl.num_programs(0), flatten=PERSISTENT):
        expert, row, end, col_tile = row_tile_at(
            tile, tile_expert_B, tile_row_B, offset_E1, n_row_tiles, n_col_tiles, E, GROUP_M
        )
        if PERSISTENT or expert < E:
            col = col_tile * BLOCK_N
            col_N = col + tl.arange(0, BLOCK_N)
            if not TMA:
                act_row_M = tl.minimum(row + row_M, end - 1).to(tl.int64) * F
                act_ptrs = act_ptr + act_row_M[:, None] + depth_K[None, :]
                w2_row_N = (expert.to(tl.int64) * D + tl.minimum(col_N, D - 1)) * F
                w2_ptrs = w2_ptr + w2_row_N[:, None] + depth_K[None, :]
            y_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for start in range(0, F, BLOCK_K):
                if TMA:
                    act_MK = act_ptr.load([row, start])
                    w2_NK = w2_ptr.load([expert, col, start]).reshape(BLOCK_N, BLOCK_K)
                else:
                    mask_1K = (depth_K < F - start)[None, :]
                    act_MK = tl.load(act_ptrs, mask=mask_1K, other=0.0)
                    w2_NK = tl.load(w2_ptrs, mask=mask_1K, other=0.0)
                    act_ptrs += BLOCK_K
                    w2_ptrs += BLOCK_K
                y_MN = dot(act_MK, w2_NK.T, y_MN, INTERPRETED)
            y_ptrs = y_ptr + row.to(tl.int64) * D + (row_M[:, None] * D + col_N[None, :])
            mask_MN = (row_M < end - row)[:, None] & (col_N < D)[None, :]
            tl.store(y_ptrs, y_MN.to(y_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def combine_kernel(
    y_ptr,  # (M, D), contiguous
    weight_ptr,  # (T, K), contiguous, or None: all weights are one
    out_ptr,  # (T, D), contiguous
    inverse_TK,  # (T, K)
    offset_E1,  # (E + 1,)
    D,
    E,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    col_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(offset_E1 + E)
    out_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse_TK + token * K + k)
        mask_D = (col_D < D) & (row < end)
        y_D = tl.load(y_ptr + row.to(tl.int64) * D + col_D, mask=mask_D, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            # An absent expert's weight may be anything, and 0 * inf is not 0.
            y_D *= tl.load(weight_ptr + token * K + k, mask=row < end, other=0.0).to(tl.float32)
        out_D += y_D
    tl.store(out_ptr + token * D + col_D, out_D.to(out_ptr.dtype.element_ty), mask=col_D < D)


@triton.jit(do_not_specialize=["M"])
def zero_padding_kernel(
    out_ptr,  # (M, D), contiguous
    offset_E1,  # (E + 1,)
    M,
    D,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Zeros in the rows past the last expert's, which no GEMM writes."""
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.load(offset_E1 + E)
    if tl.program_id(0) * BLOCK_M + BLOCK_M <= start:
        return
    mask_M = (row_M >= start) & (row_M < M)
    zero_MD = tl.zeros((BLOCK_M, BLOCK_D), dtype=out_ptr.dtype.element_ty)
    for col in range(0, D, BLOCK_D):
        col_D = col + tl.arange(0, BLOCK_D)
        out_ptrs = out_ptr + row_M.to(tl.int64)[:, None] * D + col_D[None, :]
        tl.store(out_ptrs, zero_MD, mask=mask_M[:, None] & (col_D < D)[None, :])
