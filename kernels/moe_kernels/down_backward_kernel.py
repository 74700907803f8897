"""The Triton kernel of the down-projection's backward: the gradient of the activations, and SwiGLU's backward.

    dA'[m] = dO[token[m]] W2[e];  ds_partial = row sums of dA' * act;  act_scaled = s * act;
    grad_hidden = s * dA' * d(silu(gate) * up)

No atomics, so equal inputs give equal bits. Alignment and rows past the end: see ``backward_kernels.py``.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M = T*K rows sorted by expert, B row
tiles. Index arrays: see ``routing.py``. Row and expert offsets are int64: M*D passes 2^31 on real batches.
"""

import triton
import triton.language as tl

from .tiles import dot, row_tile_start


@triton.jit
def _gate_and_up(hidden_ptr, row_M, mask_M, col, end_col, F, COLUMNS: tl.constexpr):
    """COLUMNS columns of gate and of up from column ``col`` on, up to ``end_col``."""
    col_N = col + tl.arange(0, COLUMNS)
    mask = mask_M[:, None] & (col_N < end_col)[None, :]
    gate_ptrs = hidden_ptr + (row_M * (2 * F))[:, None] + col_N[None, :]
    return tl.load(gate_ptrs, mask=mask, other=0.0), tl.load(gate_ptrs + F, mask=mask, other=0.0)


@triton.jit
def _swiglu_backward(
    grad_act,  # (BLOCK_M, COLUMNS) fp32
    gate,  # (BLOCK_M, PIECE), the first PIECE columns
    up,
    weight_M,
    row_M,
    mask_M,
    col,
    end_col,
    hidden_ptr,
    act_scaled_ptr,
    grad_hidden_ptr,
    F,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Stores act_scaled and grad_hidden of a tile's columns from ``col`` on; returns their row sums of ``dA' * act``,
    and gate and up of the PIECE columns after them, whose loads are in flight while these are computed.

    The accumulator is halved down to PIECE columns: then the temporaries fit in registers beside the rest of it, and
    one change of layout, that of the piece, makes every load and store 16 bytes wide. The pointers are those of the
    tile's first row: offsets within it fit in int32, and in fewer registers.
    """
    if COLUMNS > PIECE:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(tl.permute(tl.reshape(grad_act, (grad_act.shape[0], 2, HALF)), (0, 2, 1)))
        left_M, gate, up = _swiglu_backward(
            left,
            gate,
            up,
            weight_M,
            row_M,
            mask_M,
            col,
            end_col,
            hidden_ptr,
            act_scaled_ptr,
            grad_hidden_ptr,
            F,
            HALF,
            PIECE,
        )
        right_M, gate, up = _swiglu_backward(
            right,
            gate,
            up,
            weight_M,
            row_M,
            mask_M,
            col + HALF,
            end_col,
            hidden_ptr,
            act_scaled_ptr,
            grad_hidden_ptr,
            F,
            HALF,
            PIECE,
        )
        partial_M = left_M + right_M
    else:
        next_gate, next_up = _gate_and_up(hidden_ptr, row_M, mask_M, col + PIECE, end_col, F, PIECE)
        col_N = col + tl.arange(0, PIECE)
        mask = mask_M[:, None] & (col_N < end_col)[None, :]
        gate = gate.to(tl.float32)
        up = up.to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        act = silu * up
        partial_M = tl.sum(grad_act * act, axis=1)
        if act_scaled_ptr is not None:
            act_scaled = (act * weight_M[:, None]).to(act_scaled_ptr.dtype.element_ty)
            tl.store(act_scaled_ptr + (row_M * F)[:, None] + col_N[None, :], act_scaled, mask=mask)
        if grad_hidden_ptr is not None:
            grad_act = grad_act * weight_M[:, None]
            grad_gate_ptrs = grad_hidden_ptr + (row_M * (2 * F))[:, None] + col_N[None, :]
            grad_up = grad_act * silu
            tl.store(grad_gate_ptrs + F, grad_up.to(grad_hidden_ptr.dtype.element_ty), mask=mask)
            grad_gate = up * (grad_up + sigmoid * (grad_act - grad_up))
            tl.store(grad_gate_ptrs, grad_gate.to(grad_hidden_ptr.dtype.element_ty), mask=mask)
        gate = next_gate
        up = next_up
    return partial_M, gate, up


@triton.jit(do_not_specialize=["n_row_tiles", "n_col_tiles", "E"])
def down_backward_kernel(
    grad_out_ptr,  # (T, D), unit stride along D
    w2_ptr,  # (E, D, F), contiguous; with TMA a descriptor
    hidden_ptr,  # (M, G) [gate | up], contiguous
    weights_ptr,  # (T, K), contiguous; None: all one
    ds_partial_ptr,  # (M, n_col_tiles) fp32; None: not needed
    act_scaled_ptr,  # (M, F), contiguous; None: not needed
    grad_hidden_ptr,  # (M, G) [gate | up], contiguous; None: not needed
    flat_M,  # (M,); None: row m is token m
    tile_expert_B,  # (B,)
    tile_row_B,  # (B,)
    offset_E1,  # (E + 1,)
    n_row_tiles,
    n_col_tiles,
    stride_gt,
    D,
    F,
    E,
    K,
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
    flat = first_row + row_M
    if flat_M is not None:
        flat = tl.load(flat_M + flat, mask=mask_M, other=0)
    first_col = col_tile * BLOCK_N
    end_col = tl.minimum(first_col + BLOCK_N, F)
    hidden_ptr += first_row.to(tl.int64) * (2 * F)
    PIECE: tl.constexpr = min(BLOCK_N, 32)
    gate, up = _gate_and_up(hidden_ptr, row_M, mask_M, first_col, end_col, F, PIECE)
    grad_act = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if ds_partial_ptr is not None or grad_hidden_ptr is not None:
        depth_K = tl.arange(0, BLOCK_K)
        col_N = first_col + tl.arange(0, BLOCK_N)
        grad_out_ptrs = grad_out_ptr + (flat // K)[:, None].to(tl.int64) * stride_gt + depth_K[None, :]
        if not TMA:
            w2_ptrs = w2_ptr + expert.to(tl.int64) * D * F + depth_K[:, None] * F + col_N[None, :]
        for start in range(0, D, BLOCK_K):
            mask_K = depth_K < D - start
            grad_out = tl.load(grad_out_ptrs, mask=mask_M[:, None] & mask_K[None, :], other=0.0)
            grad_out_ptrs += BLOCK_K
            if TMA:
                w2 = w2_ptr.load([expert, start, first_col]).reshape(BLOCK_K, BLOCK_N)
            else:
                w2 = tl.load(w2_ptrs, mask=mask_K[:, None] & (col_N < F)[None, :], other=0.0)
                w2_ptrs += BLOCK_K * F
            grad_act = dot(grad_out, w2, grad_act, INTERPRETED)
    weight_M = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if weights_ptr is not None:
        weight_M = tl.load(weights_ptr + flat, mask=mask_M, other=0.0).to(tl.float32)
    first_row = first_row.to(tl.int64)
    partial_M, _, _ = _swiglu_backward(
        grad_act,
        gate,
        up,
        weight_M,
        row_M,
        mask_M,
        first_col,
        end_col,
        hidden_ptr,
        None if act_scaled_ptr is None else act_scaled_ptr + first_row * F,
        None if grad_hidden_ptr is None else grad_hidden_ptr + first_row * (2 * F),
        F,
        BLOCK_N,
        PIECE,
    )
    if ds_partial_ptr is not None:
        tl.store(ds_partial_ptr + (first_row + row_M) * n_col_tiles + col_tile, partial_M, mask=mask_M)
