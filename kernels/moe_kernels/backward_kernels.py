"""The Triton kernels of the backward. No atomics, so equal inputs give equal bits.

    down_backward     dA'[m] = dO[token[m]] W2[e];  ds_partial = row sums of dA' * act;  act_scaled = s * act;
                      grad_hidden = s * dA' * d(silu(gate) * up)
    weight_gradient   dW2[e] = sum over the rows of e of dO^T act_scaled;  dW13[e] = the same of grad_hidden^T x
    x_gradient        dx[m] = grad_hidden[m] W13[e]                        one GEMM over 2F
    router_gradient  ds[t, k] = sum of the partials of row inverse[t, k]  fp32, in the order of the column tiles

Rows past the last expert's end are uninitialised in every (M, ...) array; they are masked wherever they are read.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M = T*K rows sorted by expert, B row
tiles. Index arrays: see ``routing.py``. Row and expert offsets are int64: M*D passes 2^31 on real batches.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function are Triton's, which mypy cannot name)

import triton
import triton.language as tl

from .tiles import dot, row_tile


@triton.jit
def down_backward_kernel(
    grad_out_ptr,  # (T, D), unit stride along D
    w2_ptr,  # (E, D, F), contiguous
    hidden_ptr,  # (M, G) [gate | up], contiguous
    weights_ptr,  # (T, K), contiguous; None: all one
    ds_partial_ptr,  # (M, n_col_tiles) fp32; None: not needed
    act_scaled_ptr,  # (M, F), contiguous; None: not needed
    grad_hidden_ptr,  # (M, G) [gate | up], contiguous; None: not needed
    flat_M,  # None: row m is token m
    offset_E1,
    tile_expert_B,
    tile_row_B,
    stride_gt,
    D,
    F,
    E,
    K,
    n_row_tiles,
    n_col_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    expert, row_M, end, col_tile = row_tile(
        tile_expert_B, tile_row_B, offset_E1, n_row_tiles, n_col_tiles, E, BLOCK_M, GROUP_M
    )
    if expert >= E:
        return
    mask_M = row_M < end
    flat = row_M if flat_M is None else tl.load(flat_M + row_M, mask=mask_M, other=0)
    col_N = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_N = col_N < F
    grad_act = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if ds_partial_ptr is not None or grad_hidden_ptr is not None:
        depth_K = tl.arange(0, BLOCK_K)
        grad_out_ptrs = grad_out_ptr + (flat // K)[:, None].to(tl.int64) * stride_gt + depth_K[None, :]
        w2_ptrs = w2_ptr + expert.to(tl.int64) * D * F + depth_K[:, None] * F + col_N[None, :]
        for start in range(0, D, BLOCK_K):
            mask_K = depth_K < D - start
            grad_out = tl.load(grad_out_ptrs, mask=mask_M[:, None] & mask_K[None, :], other=0.0)
            w2 = tl.load(w2_ptrs, mask=mask_K[:, None] & mask_N[None, :], other=0.0)
            grad_act = dot(grad_out, w2, grad_act, INTERPRETED)
            grad_out_ptrs += BLOCK_K
            w2_ptrs += BLOCK_K * F

    mask = mask_M[:, None] & mask_N[None, :]
    row_M = row_M.to(tl.int64)
    in_hidden = row_M[:, None] * (2 * F) + col_N[None, :]
    gate = tl.load(hidden_ptr + in_hidden, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(hidden_ptr + in_hidden + F, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if ds_partial_ptr is not None:
        partial = tl.sum(grad_act * silu * up, axis=1)
        tl.store(ds_partial_ptr + row_M * n_col_tiles + col_tile, partial, mask=mask_M)
    if weights_ptr is None:
        weight = 1.0
    else:
        weight = tl.load(weights_ptr + flat, mask=mask_M, other=0.0).to(tl.float32)[:, None]
    if act_scaled_ptr is not None:
        act_scaled = (silu * up * weight).to(act_scaled_ptr.dtype.element_ty)
        tl.store(act_scaled_ptr + row_M[:, None] * F + col_N[None, :], act_scaled, mask=mask)
    if grad_hidden_ptr is not None:
        element = grad_hidden_ptr.dtype.element_ty
        grad_act = grad_act * weight
        tl.store(grad_hidden_ptr + in_hidden + F, (grad_act * silu).to(element), mask=mask)
        grad_gate = grad_act * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(grad_hidden_ptr + in_hidden, grad_gate.to(element), mask=mask)


@triton.jit
def x_gradient_kernel(
    grad_hidden_ptr,  # (M, G) [gate | up], contiguous
    w13_ptr,  # gate rows (E, F, D), stride_we from expert to expert; up rows lie up_offset further
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    expert, row_M, end, col_tile = row_tile(
        tile_expert_B, tile_row_B, offset_E1, n_row_tiles, n_col_tiles, E, BLOCK_M, GROUP_M
    )
    if expert >= E:
        return
    mask_M = row_M < end
    row_M = row_M.to(tl.int64)
    col_N = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_N = col_N < D
    depth_K = tl.arange(0, BLOCK_K)
    grad_hidden_ptrs = grad_hidden_ptr + row_M[:, None] * (2 * F) + depth_K[None, :]
    w13_ptrs = w13_ptr + expert.to(tl.int64) * stride_we + depth_K[:, None].to(tl.int64) * D + col_N[None, :]
    dx = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    steps = tl.cdiv(F, BLOCK_K)
    # One product a step, gate rows first: two products into one accumulator miscompile on Blackwell.
    for step in range(2 * steps):
        half = step // steps
        start = (step - half * steps) * BLOCK_K
        mask_K = depth_K < F - start
        grad_hidden = tl.load(grad_hidden_ptrs + half * F + start, mask=mask_M[:, None] & mask_K[None, :], other=0.0)
        w13 = tl.load(
            w13_ptrs + half.to(tl.int64) * up_offset + start * D, mask=mask_K[:, None] & mask_N[None, :], other=0.0
        )
        dx = dot(grad_hidden, w13, dx, INTERPRETED)
    dx_ptrs = dx_ptr + row_M[:, None] * D + col_N[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask_M[:, None] & mask_N[None, :])


@triton.jit
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
    K,
    n_row_tiles,
    n_col_tiles,
    GATHER_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``grad[e] = left[rows of e]^T right[rows of e]``; zeros for an expert without rows."""
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
    for start in range(begin, end, BLOCK_K):
        row_K = start + tl.arange(0, BLOCK_K)
        mask_K = row_K < end
        token = row_K
        if flat_M is not None:
            token = tl.load(flat_M + row_K, mask=mask_K, other=0) // K
        left_row = (token if GATHER_LEFT else row_K).to(tl.int64)
        right_row = (row_K if GATHER_LEFT else token).to(tl.int64)
        left = tl.load(
            left_ptr + left_row[:, None] * stride_lm + row_R[None, :],
            mask=mask_K[:, None] & mask_R[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + right_row[:, None] * stride_rm + col_C[None, :],
            mask=mask_K[:, None] & mask_C[None, :],
            other=0.0,
        )
        grad = dot(tl.trans(left), right, grad, INTERPRETED)
    row_R = row_R.to(tl.int64)
    row_start = expert.to(tl.int64) * split * C + row_R * C + tl.where(row_R < split, 0, jump)
    tl.store(
        grad_ptr + row_start[:, None] + col_C[None, :],
        grad.to(grad_ptr.dtype.element_ty),
        mask=mask_R[:, None] & mask_C[None, :],
    )


@triton.jit
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
