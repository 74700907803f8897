"""Sorts routed rows by expert and maps row tiles to experts, without a host sync.

Glossary (M = T*K routed rows, E experts, K top-k; "flat" is the position ``t*K + k``, "sorted" that by expert):

    flat_M           sorted -> flat; the token is flat // K
    inverse_TK       flat -> sorted
    offset_E1        first sorted row of each expert, then the end of the last; rows past it belong to no expert
    tile_expert_B    row tile -> expert; E for the tiles past the last real one
    tile_row_B       row tile -> its first sorted row

An index of E (and on the device any index outside ``[0, E)``) names an absent expert: its rows sort behind all others,
are not computed, and add nothing to the output. Expert parallelism marks the experts of other ranks so.
"""

import importlib.util
import sys
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The index arrays of the glossary above, int32, on the device of the routing.

    ``flat_M`` and ``inverse_TK`` are None where the rows came sorted (one row a token, in expert order).
    """

    top_k: int
    offset_E1: Tensor
    flat_M: Tensor | None = None
    inverse_TK: Tensor | None = None

    @property
    def experts(self) -> int:
        return self.offset_E1.numel() - 1


def build_routing(top_k_index_TK: Tensor, *, experts: int) -> Routing:
    """Sorts the M routed rows by expert; equal experts keep token order, so the result is unique.

    Two launches on CUDA, and no value comes back to the host.

    Args:
        top_k_index_TK: chosen experts, int32 or int64, (T, K), any strides; ``experts`` itself for an absent one.
        experts: E.

    Raises:
        IndexError: on CPU, an index is outside ``[0, E]``. On the device such an index names an absent expert.
    """
    if top_k_index_TK.numel() > 0 and _runs_triton(top_k_index_TK.device):
        return sort_rows_triton(top_k_index_TK, experts=experts)
    return sort_rows_torch(top_k_index_TK, experts=experts)


def tile_map(offset_E1: Tensor, *, rows: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """``tile_expert_B`` and ``tile_row_B`` for row tiles of ``block_rows``; one launch on CUDA.

    The number of tiles depends on the data, and reading it back would stall the device; the grid gets the bound
    ``B = rows // block_rows + min(E, rows)`` instead, and the programs past the true count return at once.
    """
    if rows > 0 and _runs_triton(offset_E1.device):
        return tile_map_triton(offset_E1, rows=rows, block_rows=block_rows)
    return tile_map_torch(offset_E1, rows=rows, block_rows=block_rows)


def presorted_routing(counts_E: Tensor) -> Routing:
    """The routing of rows that came sorted by expert, ``counts_E`` of them for each; no value comes to the host."""
    offset_E1 = torch.zeros(counts_E.numel() + 1, dtype=torch.int32, device=counts_E.device)
    torch.cumsum(counts_E, 0, dtype=torch.int32, out=offset_E1[1:])
    return Routing(top_k=1, offset_E1=offset_E1)


def sort_rows_torch(top_k_index_TK: Tensor, *, experts: int) -> Routing:
    """:func:`build_routing` in torch operators, on any device."""
    tokens, top_k = top_k_index_TK.shape
    index_M = top_k_index_TK.reshape(-1)
    device = index_M.device
    index_M = in_range(index_M, experts=experts)
    if experts < 2**15:
        index_M = index_M.short()  # a radix sort: a quarter of the bytes is a third of the time
    sorted_M, order_M = torch.sort(index_M, stable=True)
    inverse_M = torch.empty_like(order_M, dtype=torch.int32)
    inverse_M[order_M] = torch.arange(tokens * top_k, device=device, dtype=torch.int32)
    # searchsorted, not bincount: bincount reads its maximum back to the host.
    edges_E1 = torch.arange(experts + 1, device=device, dtype=sorted_M.dtype)
    return Routing(
        top_k=top_k,
        offset_E1=torch.searchsorted(sorted_M, edges_E1, out_int32=True),
        flat_M=order_M.int(),
        inverse_TK=inverse_M.view(tokens, top_k),
    )


def sort_rows_triton(top_k_index_TK: Tensor, *, experts: int) -> Routing:
    """:func:`build_routing` in Triton, for at least one row."""
    from .routing_kernels import count_kernel, place_kernel  # triton is imported only where it runs

    tokens, top_k = top_k_index_TK.shape
    rows = tokens * top_k
    tile_rows = min(max(_power_of_2(-(-rows // 128)), 128), 4096)
    block_experts = _power_of_2(experts + 1)
    n_tiles = -(-rows // tile_rows)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=top_k_index_TK.device)

    count_NE1, offset_E1 = empty(n_tiles, experts + 1), empty(experts + 1)
    flat_M, inverse_TK = empty(rows), empty(tokens, top_k)
    shared = {
        "index_TK": top_k_index_TK,
        "count_NE1": count_NE1,
        "stride_t": top_k_index_TK.stride(0),
        "stride_k": top_k_index_TK.stride(1),
        "M": rows,
        "K": top_k,
        "E": experts,
        "TILE_ROWS": tile_rows,
        "BLOCK_E": block_experts,
    }
    count_kernel[(n_tiles,)](**shared)
    place_kernel[(n_tiles,)](
        offset_E1=offset_E1,
        flat_M=flat_M,
        inverse_TK=inverse_TK,
        N=n_tiles,
        BLOCK_C=128,
        BLOCK_N=max(4096 // block_experts, 1),
        **shared,
    )
    return Routing(top_k=top_k, offset_E1=offset_E1, flat_M=flat_M, inverse_TK=inverse_TK)


def tile_map_torch(offset_E1: Tensor, *, rows: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """:func:`tile_map` in torch operators, on any device."""
    tile_B = torch.arange(_tile_bound(offset_E1, rows=rows, block_rows=block_rows), device=offset_E1.device)
    tiles_E = (offset_E1.diff() + block_rows - 1) // block_rows
    tile_end_E = tiles_E.cumsum(0)
    tile_expert_B = torch.searchsorted(tile_end_E, tile_B, right=True)
    first_tile_E1 = torch.cat([tile_end_E.new_zeros(1), tile_end_E])
    tile_row_B = offset_E1[tile_expert_B] + (tile_B - first_tile_E1[tile_expert_B]) * block_rows
    return tile_expert_B.int(), tile_row_B.int()


def tile_map_triton(offset_E1: Tensor, *, rows: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """:func:`tile_map` in Triton, for at least one row."""
    from .routing_kernels import tiles_kernel

    n_tiles = _tile_bound(offset_E1, rows=rows, block_rows=block_rows)
    tile_expert_B = torch.empty(n_tiles, dtype=torch.int32, device=offset_E1.device)
    tile_row_B = torch.empty_like(tile_expert_B)
    experts = offset_E1.numel() - 1
    block_experts = _power_of_2(experts)
    block_tiles = min(max(8192 // block_experts, 1), 128)
    tiles_kernel[(-(-n_tiles // block_tiles),)](
        offset_E1=offset_E1,
        tile_expert_B=tile_expert_B,
        tile_row_B=tile_row_B,
        E=experts,
        B=n_tiles,
        TILE_ROWS=block_rows,
        BLOCK_B=block_tiles,
        BLOCK_E=block_experts,
    )
    return tile_expert_B, tile_row_B


def _tile_bound(offset_E1: Tensor, *, rows: int, block_rows: int) -> int:
    return rows // block_rows + min(offset_E1.numel() - 1, rows)


def in_range(index: Tensor, *, experts: int) -> Tensor:
    """The index itself on CPU; on a device, with E for what lies outside ``[0, E]``.

    Raises:
        IndexError: on CPU, an index is outside ``[0, E]``.
    """
    if index.device.type != "cpu":
        return torch.where((index < 0) | (index > experts), experts, index)
    if index.numel() == 0:
        return index
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high > experts:
        raise IndexError(
            f"experts layer: top_k_index must lie in [0, {experts}), or be {experts} for an absent expert; "
            f"got [{low}, {high}]"
        )
    return index


def _power_of_2(n: int) -> int:
    """The next one at or above n."""
    return 1 << (n - 1).bit_length()


def _runs_triton(device: torch.device) -> bool:
    """On CUDA where triton is installed; on CPU if this process runs Triton's interpreter."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    triton = sys.modules.get("triton")
    return device.type == "cpu" and triton is not None and triton.knobs.runtime.interpret
