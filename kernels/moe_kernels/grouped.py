"""The Triton forward: gather + grouped GEMM + SwiGLU, grouped GEMM, combine in a fixed order. No atomics.

    up       act[m] = silu(Wgate[e] x[token[m]]) * (Wup[e] x[token[m]])     one pass over x for both halves
    down     y[m]   = W2[e] act[m]
    combine  out[t] = sum_k weight[t, k] * y[inverse[t, k]]                 fp32, in the order of k

Triton's interpreter holds bf16 as integers and multiplies those, silently; ``_dot`` widens the operands first there.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F, E experts, K top-k, M = T*K rows sorted by
expert. Index arrays: see ``routing.py``. Row and expert offsets are int64: M*D passes 2^31 on real batches.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function are Triton's, which mypy cannot name)

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .config import tile_config
from .routing import build_routing


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _tile(tile_expert_B, tile_row_B, n_tile_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's expert, its sorted rows with their mask, and its columns. Column tiles of a row tile are
    neighbours in launch order, so that they find the rows in L2."""
    tile = tl.program_id(0) // n_tile_cols
    col_N = (tl.program_id(0) % n_tile_cols) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(tile_expert_B + tile)
    row_M = tl.load(tile_row_B + tile) + tl.arange(0, BLOCK_M)
    return expert, row_M, col_N


@triton.jit
def up_kernel(
    x_ptr,  # (T, D), unit stride along D
    w13_ptr,  # (E, 2F, D), contiguous
    act_ptr,  # (M, F), contiguous
    token_M,
    offset_E1,
    tile_expert_B,
    tile_row_B,
    stride_xt,
    D,
    F,
    E,
    n_tile_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    expert, row_M, col_N = _tile(tile_expert_B, tile_row_B, n_tile_cols, BLOCK_M, BLOCK_N)
    if expert >= E:
        return
    mask_M = row_M < tl.load(offset_E1 + expert + 1)
    token = tl.load(token_M + row_M, mask=mask_M, other=0)
    depth_K = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + token[:, None].to(tl.int64) * stride_xt + depth_K[None, :]
    gate_row = expert.to(tl.int64) * 2 * F
    gate_ptrs = w13_ptr + (gate_row + col_N[None, :]) * D + depth_K[:, None]
    up_ptrs = w13_ptr + (gate_row + F + col_N[None, :]) * D + depth_K[:, None]
    gate_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        mask_K = depth_K < D - start
        x = tl.load(x_ptrs, mask=mask_M[:, None] & mask_K[None, :], other=0.0)
        mask_KN = mask_K[:, None] & (col_N < F)[None, :]
        gate_MN = _dot(x, tl.load(gate_ptrs, mask=mask_KN, other=0.0), gate_MN, INTERPRETED)
        up_MN = _dot(x, tl.load(up_ptrs, mask=mask_KN, other=0.0), up_MN, INTERPRETED)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    act_MN = gate_MN * tl.sigmoid(gate_MN) * up_MN
    act_ptrs = act_ptr + row_M[:, None].to(tl.int64) * F + col_N[None, :]
    tl.store(act_ptrs, act_MN.to(act_ptr.dtype.element_ty), mask=mask_M[:, None] & (col_N < F)[None, :])


@triton.jit
def down_kernel(
    act_ptr,  # (M, F), contiguous
    w2_ptr,  # (E, D, F), contiguous
    y_ptr,  # (M, D), contiguous
    offset_E1,
    tile_expert_B,
    tile_row_B,
    D,
    F,
    E,
    n_tile_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    expert, row_M, col_N = _tile(tile_expert_B, tile_row_B, n_tile_cols, BLOCK_M, BLOCK_N)
    if expert >= E:
        return
    mask_M = row_M < tl.load(offset_E1 + expert + 1)
    depth_K = tl.arange(0, BLOCK_K)
    act_ptrs = act_ptr + row_M[:, None].to(tl.int64) * F + depth_K[None, :]
    w2_ptrs = w2_ptr + (expert.to(tl.int64) * D + col_N[None, :]) * F + depth_K[:, None]
    y_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, F, BLOCK_K):
        mask_K = depth_K < F - start
        act = tl.load(act_ptrs, mask=mask_M[:, None] & mask_K[None, :], other=0.0)
        w2 = tl.load(w2_ptrs, mask=mask_K[:, None] & (col_N < D)[None, :], other=0.0)
        y_MN = _dot(act, w2, y_MN, INTERPRETED)
        act_ptrs += BLOCK_K
        w2_ptrs += BLOCK_K
    y_ptrs = y_ptr + row_M[:, None].to(tl.int64) * D + col_N[None, :]
    tl.store(y_ptrs, y_MN.to(y_ptr.dtype.element_ty), mask=mask_M[:, None] & (col_N < D)[None, :])


@triton.jit
def combine_kernel(
    y_ptr,  # (M, D), contiguous
    weight_ptr,  # (T, K), contiguous
    inverse_TK,
    out_ptr,  # (T, D), contiguous
    D,
    K,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    col_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    out_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k in range(K):
        row = tl.load(inverse_TK + token * K + k).to(tl.int64)
        weight = tl.load(weight_ptr + token * K + k).to(tl.float32)
        out_D += weight * tl.load(y_ptr + row * D + col_D, mask=col_D < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + col_D, out_D.to(out_ptr.dtype.element_ty), mask=col_D < D)


def experts_grouped(
    x_TD: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
) -> Tensor:
    """The experts layer of :func:`moe_kernels.reference.experts_reference` in Triton, forward only.

    Args:
        x_TD: tokens, (T, D), fp32, fp16 or bf16, on CUDA (on CPU only under ``TRITON_INTERPRET=1``).
        w13_EGD: ``[gate; up]`` projections, (E, 2F, D), the dtype of ``x_TD``.
        w2_EDF: down projections, (E, D, F), the dtype of ``x_TD``.
        top_k_index_TK: chosen experts, integers in ``[0, E)``, (T, K). Not range-checked: that would stall the device.
        top_k_weights_TK: routing weights, (T, K), any floating dtype.

    Returns:
        (T, D) in the dtype of ``x_TD``, without a gradient. fp32 multiplies exactly, never in TF32.
    """
    tokens, hidden = x_TD.shape
    experts, _, width = w2_EDF.shape
    top_k = top_k_index_TK.shape[1]
    rows = tokens * top_k
    out_TD = torch.zeros((tokens, hidden), dtype=x_TD.dtype, device=x_TD.device)
    if rows == 0:
        return out_TD
    x_TD, w13_EGD, w2_EDF = x_TD.contiguous(), w13_EGD.contiguous(), w2_EDF.contiguous()
    tile = tile_config(rows, experts=experts, itemsize=x_TD.element_size())
    routing = build_routing(top_k_index_TK, experts=experts, block_rows=tile.block_rows)
    blocks = {"BLOCK_M": tile.block_rows, "BLOCK_N": tile.block_cols, "BLOCK_K": tile.block_depth}
    launch = {"INTERPRETED": knobs.runtime.interpret, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    n_tiles = routing.tile_expert_B.numel()
    maps = (routing.offset_E1, routing.tile_expert_B, routing.tile_row_B)

    act_MF = x_TD.new_empty((rows, width))
    n_cols = triton.cdiv(width, tile.block_cols)
    up_kernel[(n_tiles * n_cols,)](
        x_TD,
        w13_EGD,
        act_MF,
        routing.token_M,
        *maps,
        x_TD.stride(0),
        hidden,
        width,
        experts,
        n_cols,
        **blocks,
        **launch,
    )
    y_MD = x_TD.new_empty((rows, hidden))
    n_cols = triton.cdiv(hidden, tile.block_cols)
    down_kernel[(n_tiles * n_cols,)](act_MF, w2_EDF, y_MD, *maps, hidden, width, experts, n_cols, **blocks, **launch)
    block_hidden = min(triton.next_power_of_2(hidden), 1024)
    combine_kernel[(tokens, triton.cdiv(hidden, block_hidden))](
        y_MD, top_k_weights_TK.contiguous(), routing.inverse_TK, out_TD, hidden, top_k, BLOCK_D=block_hidden
    )
    return out_TD
