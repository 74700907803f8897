"""The experts layer forward in Triton: allocates with ``torch.empty`` and launches, nothing else.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M = T*K routed rows sorted by expert.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Kernel, Tile, current_arch, tile
from .forward_kernels import combine_kernel, down_kernel, up_kernel, zero_padding_kernel
from .routing import Routing, tile_map

# From this many elements on, a tile's accumulator leaves no registers for a second program on a multiprocessor, which
# would compute while the first one writes. The kernel then overlaps the two itself.
LARGE_TILE = 128 * 256


def experts_forward_triton(
    x_TD: Tensor,
    w13: Tensor,
    w3: Tensor | None,
    w2_EDF: Tensor,
    *,
    weights_TK: Tensor | None,
    routing: Routing,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """The layer of :func:`moe_kernels.reference.experts_reference`, without a gradient.

    Args:
        x_TD: tokens, (T, D), fp32, fp16 or bf16, on CUDA (on CPU only under ``TRITON_INTERPRET=1``).
        w13: ``[gate; up]`` projections, (E, 2F, D), or with ``w3`` the gate projections alone, (E, F, D). Another
            dtype than that of ``x_TD`` is cast for the call.
        w3: up projections, (E, F, D), or None.
        w2_EDF: down projections, (E, D, F).
        weights_TK: routing weights, (T, K), any floating dtype; None for rows that came sorted.
        routing: which rows belong to which expert. Rows of absent experts add nothing; where the rows came sorted,
            those past the last expert's are padding, and zero in the output.
        keep_hidden: whether the backward will want the pre-activations.

    Returns:
        out (T, D) and the pre-activations ``[gate | up]`` (M, G) in sorted order (empty unless ``keep_hidden``; the
        rows of no expert uninitialised), both in the dtype of ``x_TD``. fp32 multiplies exactly, never in TF32.
    """
    tokens, model_dim = x_TD.shape
    width, rows = w2_EDF.shape[2], tokens * routing.top_k
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    gate, up_offset = gate_and_up_offset(w13, w3, dtype=x_TD.dtype)
    w2_EDF = w2_EDF.to(x_TD.dtype).contiguous()
    out_TD = x_TD.new_empty((tokens, model_dim))
    hidden_MG = x_TD.new_empty((rows, 2 * width) if keep_hidden else (0,))
    act_MF = x_TD.new_empty((rows, width))
    sorted_rows = routing.flat_M is None
    y_MD = out_TD if sorted_rows else x_TD.new_empty((rows, model_dim))

    if rows:
        grid, launch = row_tile_launch("up", routing, rows=rows, columns=width, depth=model_dim, like=x_TD)
        block = [1, 2, launch["BLOCK_N"], launch["BLOCK_K"]]
        tma = gate_and_up_by_descriptor(gate, up_offset, depth=launch["BLOCK_K"])
        up_kernel[grid](
            x_ptr=x_TD,
            w13_ptr=gate_and_up_descriptor(gate, up_offset, width=width, block=block) if tma else gate,
            hidden_ptr=hidden_MG if keep_hidden else None,
            act_ptr=act_MF,
            flat_M=routing.flat_M,
            stride_xt=x_TD.stride(0),
            stride_we=gate.stride(0),
            up_offset=up_offset,
            D=model_dim,
            F=width,
            ALIGN_F=math.gcd(width, 16),
            K=routing.top_k,
            TMA=tma,
            **launch,
        )
        grid, launch = row_tile_launch("down", routing, rows=rows, columns=model_dim, depth=width, like=x_TD)
        block_m, block_n, block_k = launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_K"]
        tma = loads_by_descriptor(w2_EDF, width, depth=block_k)
        # Blackwell's accumulators lie in a memory of their own.
        persistent = tma and block_m * block_n >= LARGE_TILE and current_arch() < 100
        if persistent:
            grid = (min(grid[0], multiprocessors(x_TD.device)),)
        down_kernel[grid](
            act_ptr=TensorDescriptor.from_tensor(act_MF, [block_m, block_k]) if tma else act_MF,
            w2_ptr=TensorDescriptor.from_tensor(w2_EDF, [1, block_n, block_k]) if tma else w2_EDF,
            y_ptr=y_MD,
            D=model_dim,
            F=width,
            ALIGN_F=math.gcd(width, 16),
            BLOCK_E=triton.next_power_of_2(routing.experts),
            TMA=tma,
            PERSISTENT=persistent,
            **launch,
        )
    if sorted_rows:
        zero_padding(out_TD, routing)
    else:
        combine(y_MD, out_TD, weights_TK=weights_TK, routing=routing)
    return out_TD, hidden_MG


def multiprocessors(device: torch.device) -> int:
    """How many programs of large tiles run at once; in the interpreter few, so that each has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def gate_and_up_offset(w13: Tensor, w3: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The gate projections (or the fused ones, which begin with them) in ``dtype``, contiguous, and the elements from
    one of them to the same element of the up projections: separate weights need no concatenated copy, unless they are
    of another dtype.

    ``w3`` must outlive the use of the result.
    """
    if w3 is None:
        w13 = w13.to(dtype).contiguous()
        return w13, w13.shape[1] // 2 * w13.shape[2]
    if w13.dtype == w3.dtype == dtype and w13.is_contiguous() and w3.is_contiguous():
        return w13, (w3.data_ptr() - w13.data_ptr()) // w13.element_size()
    experts, width, model_dim = w13.shape
    fused = w13.new_empty((experts, 2 * width, model_dim), dtype=dtype)
    fused[:, :width].copy_(w13)
    fused[:, width:].copy_(w3)
    return fused, width * model_dim


def gate_and_up_by_descriptor(gate: Tensor, up_offset: int, *, depth: int) -> bool:
    """:func:`loads_by_descriptor` for both projections as one (E, 2, F, D).

    CUDA specifies that each stride spans the dimension inside it, which separate projections in memory do not.
    """
    nested = gate.stride(0) == 2 * up_offset
    return nested and loads_by_descriptor(gate, gate.stride(0), up_offset, gate.shape[2], depth=depth)


def gate_and_up_descriptor(gate: Tensor, up_offset: int, *, width: int, block: list[int]) -> TensorDescriptor:
    """Both projections as one (E, 2, F, D), in blocks of this shape."""
    experts, model_dim = gate.shape[0], gate.shape[2]
    return TensorDescriptor(gate, [experts, 2, width, model_dim], [gate.stride(0), up_offset, model_dim, 1], block)


def loads_by_descriptor(weight: Tensor, *strides: int, depth: int) -> bool:
    """Whether the tensor memory accelerator of Hopper and newer can load tiles of ``weight``, half precision.

    It wants all strides but the last, and the address, in multiples of 16 bytes. A tile's rows of ``depth`` elements
    are held to the 128 bytes of one swizzle, so that gate and up tiles lie in shared memory like a single one.
    """
    size = weight.element_size()
    aligned = all(stride > 0 and stride * size % 16 == 0 for stride in strides) and weight.data_ptr() % 16 == 0
    return size == 2 and aligned and depth * size <= 128 and current_arch() >= 90


def row_tile_launch(
    kernel: Kernel, routing: Routing, *, rows: int, columns: int, depth: int, like: Tensor
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of a kernel over tiles of sorted rows and columns, and the arguments that all such kernels share."""
    experts, itemsize = routing.experts, like.element_size()
    shape = tile(kernel, rows_per_expert=rows / experts, columns=columns, depth=depth, itemsize=itemsize)
    tile_expert_B, tile_row_B = tile_map(routing.offset_E1, rows=rows, block_rows=shape.block_m)
    n_row_tiles, n_col_tiles = tile_expert_B.numel(), triton.cdiv(columns, shape.block_n)
    return (n_row_tiles * n_col_tiles,), {
        "tile_expert_B": tile_expert_B,
        "tile_row_B": tile_row_B,
        "offset_E1": routing.offset_E1,
        "n_row_tiles": n_row_tiles,
        "n_col_tiles": n_col_tiles,
        "E": experts,
        **tile_arguments(shape),
    }


def tile_arguments(shape: Tile) -> dict[str, Any]:
    """A tile as arguments of a launch."""
    return {
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "BLOCK_K": shape.block_k,
        "GROUP_M": shape.group_m,
        "INTERPRETED": knobs.runtime.interpret,
        "num_warps": shape.num_warps,
        "num_stages": shape.num_stages,
    }


def combine(y_MD: Tensor, out_TD: Tensor, *, weights_TK: Tensor | None, routing: Routing) -> None:
    """Writes the weighted sum of each token's K rows; ``weights_TK=None`` weighs them by one."""
    tokens, model_dim = out_TD.shape
    if tokens == 0:
        return
    block = min(triton.next_power_of_2(model_dim), 1024)
    combine_kernel[(tokens, triton.cdiv(model_dim, block))](
        y_ptr=y_MD,
        weight_ptr=None if weights_TK is None else weights_TK.contiguous(),
        out_ptr=out_TD,
        inverse_TK=routing.inverse_TK,
        offset_E1=routing.offset_E1,
        D=model_dim,
        E=routing.experts,
        K=routing.top_k,
        BLOCK_D=block,
    )


def zero_padding(out_MD: Tensor, routing: Routing) -> None:
    """Zeroes the rows past the last expert's: one launch whose programs return at once where there are none."""
    rows, model_dim = out_MD.shape
    if rows == 0:
        return
    block = min(triton.next_power_of_2(model_dim), 1024)
    zero_padding_kernel[(triton.cdiv(rows, 16),)](
        out_ptr=out_MD, offset_E1=routing.offset_E1, M=rows, D=model_dim, E=routing.experts, BLOCK_M=16, BLOCK_D=block
    )
