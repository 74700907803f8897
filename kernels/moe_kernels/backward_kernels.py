"""The Triton kernels of the backward, except ``down_backward_kernel.py``. No atomics: equal inputs give equal bits.

    weight_gradient   dW2[e] = sum over the rows of e of dO^T act_scaled;  dW13[e] = the same of grad_hidden^T x
    x_gradient        dx[m] = grad_hidden[m] W13[e]                        one GEMM over 2F
    router_gradient   ds[t, k] = sum of the partials of row inverse[t, k]  fp32, in a fixed order

Triton knows of an integer argument only whether 16 divides it. ``F // ALIGN * ALIGN`` tells the compiler of smaller
divisors, without which a width such as 24 = 3 * 8 would be loaded element by element.

Rows past the last expert's end are uninitialised in every (M, ...) array: a reduction over rows masks them on both
operands, and elsewhere a row only reaches itself, which is not stored.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M = T*K rows sorted by expert, B row
tiles. Index arrays: see ``routing.py``. Row and expert offsets are int64: M*D passes 2^31 on real batches.
"""

import triton
import triton.language as tl

from .tiles import dot, row_tile_start


@triton.jit(do_not_specialize=["n_row_tiles", "n_col_tiles", "E"])
def x_gradient_kernel(
    grad_hidden_ptr,  # (M, G) [gate | up], contiguous; with TMA a descriptor
    w13_ptr,  # gate rows (E, F, D), stride_we between experts; up rows lie up_offset further; with TMA a descriptor
    dx_ptr,  # (M, D), contiguous
    offset_E1,
    tile_expert_B,
    tile_row_B,
    stride_we,
    up_offset,
    D,
    F,
    E,
    n_row_tiles,
    n_col_tiles,
    ALIGN: tl.constexpr,  # F is a multiple of it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    expert, first_row, end, col_tile = row_tile_start(
        tile_expert_B, tile_row_B, offset_E1, n_row_tiles, n_col_tiles, E, GROUP_M
    )
    if expert >= E:
        return
    F = F // ALIGN * ALIGN
    row_M = tl.arange(0, BLOCK_M)
    mask_M = row_M < end - first_row
    row = first_row.to(tl.int64)
    first_col = col_tile * BLOCK_N
    col_N = first_col + tl.arange(0, BLOCK_N)
    mask_N = col_N < D
    depth_K = tl.arange(0, BLOCK_K)
    if not TMA:
        grad_hidden_ptrs = grad_hidden_ptr + row * (2 * F) + row_M[:, None] * (2 * F) + depth_K[None, :]
        w13_ptrs = w13_ptr + expert.to(tl.int64) * stride_we + depth_K[:, None] * D + col_N[None, :]
    dx = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    steps = tl.cdiv(F, BLOCK_K)
    # One product a step, gate rows first: two products into one accumulator miscompile on Blackwell.
    for step in range(2 * steps):
        half = tl.where(step < steps, 0, 1)
        start = (step - half * steps) * BLOCK_K
        if TMA:
            # Past the gate's columns come the up projection's, which meet the zeros past the gate's rows.
            grad_hidden = grad_hidden_ptr.load([first_row, half * F + start])
            w13 = w13_ptr.load([expert, half, start, first_col]).reshape(BLOCK_K, BLOCK_N)
        else:
            mask_K = depth_K < F - start
            mask_MK = mask_M[:, None] & mask_K[None, :]
            grad_hidden = tl.load(grad_hidden_ptrs + half * F + start, mask=mask_MK, other=0.0)
            offset = half.to(tl.int64) * up_offset + start.to(tl.int64) * D
            w13 = tl.load(w13_ptrs + offset, mask=mask_K[:, None] & mask_N[None, :], other=0.0)
        dx = dot(grad_hidden, w13, dx, INTERPRETED)
    dx_ptrs = dx_ptr + row * D + row_M[:, None] * D + col_N[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask_M[:, None] & mask_N[None, :])


@triton.jit(do_not_specialize=["n_row_tiles", "n_col_tiles"])
def weight_gradient_kernel(
    left_ptr,  # (M or T, R), unit stride along R
    right_ptr,  # (M or T, C), unit stride along C
    grad_ptr,  # (E, split, C), contiguous; rows from split on lie jump elements further than they would in (E, R, C)
    flat_M,  # None: row m is token m
    offset_E1,
    stride_lm,
    stride_rm,
    split,
    jump,
    R,
    C,
    n_row_tiles,
    n_col_tiles,
    K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    ALIGN: tl.constexpr,  # R, C and the strides are multiples of it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``grad[e] = left[rows of e]^T right[rows of e]``; zeros for an expert without rows.

    left is loaded as its transpose: behind a ``tl.trans`` the load would not be pipelined on sm_80.
    """
    stride_lm = stride_lm // ALIGN * ALIGN
    stride_rm = stride_rm // ALIGN * ALIGN
    R = R // ALIGN * ALIGN
    C = C // ALIGN * ALIGN
    n_tiles = n_row_tiles * n_col_tiles
    expert = tl.program_id(0) // n_tiles
    within = tl.program_id(0) % n_tiles
    row_tile, col_tile = tl.swizzle2d(within // n_col_tiles, within % n_col_tiles, n_row_tiles, n_col_tiles, GROUP_M)
    row_R = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col_C = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_R = row_R < R
    mask_C = col_C < C
    begin = tl.load(offset_E1 + expert)
    end = tl.load(offset_E1 + expert + 1)
    grad = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    depth_K = tl.arange(0, BLOCK_K)
    # The tokens of a step are loaded one step ahead: a load that waits for another would halve the pipeline's depth.
    flat_K = depth_K
    if flat_M is not None:
        flat_K = tl.load(flat_M + begin + depth_K, mask=depth_K < end - begin, other=0)
    for start in range(begin, end, BLOCK_K):
        row_K = start + depth_K
        mask_K = row_K < end
        token_K = row_K
        if flat_M is not None:
            token_K = flat_K // K
            flat_K = tl.load(flat_M + row_K + BLOCK_K, mask=row_K < end - BLOCK_K, other=0)
        left_row_K = (token_K if GATHER_LEFT else row_K).to(tl.int64)
        left_ptrs = left_ptr + row_R[:, None] + (left_row_K * stride_lm)[None, :]
        left = tl.load(left_ptrs, mask=mask_R[:, None] & mask_K[None, :], other=0.0)
        right_row_K = (row_K if GATHER_LEFT else token_K).to(tl.int64)
        right_ptrs = right_ptr + (right_row_K * stride_rm)[:, None] + col_C[None, :]
        right = tl.load(right_ptrs, mask=mask_K[:, None] & mask_C[None, :], other=0.0)
        grad = dot(left, right, grad, INTERPRETED)
    row_R = row_R.to(tl.int64)
    row_start = expert.to(tl.int64) * split * C + row_R * C + tl.where(row_R < split, 0, jump)
    tl.store(
        grad_ptr + row_start[:, None] + col_C[None, :],
        grad.to(grad_ptr.dtype.element_ty),
        mask=mask_R[:, None] & mask_C[None, :],
    )


@triton.jit(do_not_specialize=["M", "E", "n_col_tiles"])
def router_gradient_kernel(
    ds_partial_ptr,  # (M, n_col_tiles) fp32, contiguous
    ds_ptr,  # (T, K), contiguous
    inverse_TK,
    offset_E1,
    M,
    E,
    n_col_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    flat = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(inverse_TK + flat, mask=flat < M, other=M)
    col_N = tl.arange(0, BLOCK_N)
    mask = (row < tl.load(offset_E1 + E))[:, None] & (col_N < n_col_tiles)[None, :]
    partial = tl.load(ds_partial_ptr + row[:, None].to(tl.int64) * n_col_tiles + col_N[None, :], mask=mask, other=0.0)
    tl.store(ds_ptr + flat, tl.sum(partial, axis=1).to(ds_ptr.dtype.element_ty), mask=flat < M)
