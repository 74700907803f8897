"""Routing metadata: which rows belong to which expert, and which tile computes them. No host sync.

Glossary (M = T*K routed rows, E experts, K top-k; "flat" is the position ``t*K + k``, "sorted" that by expert):

    flat_M           sorted -> flat; the token is flat // K
    inverse_TK       flat -> sorted
    offset_E1        first sorted row of each expert, then the end of the last; rows past it belong to no expert
    tile_expert_B    row tile -> expert; E for the tiles past the last real one
    tile_row_B       row tile -> its first sorted row

An index of E (and on the device any index outside ``[0, E)``) names an absent expert: its rows sort behind all others,
are not computed, and add nothing to the output. Expert parallelism marks the experts of other ranks so.
"""

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

    Args:
        top_k_index_TK: chosen experts, integers, (T, K); ``experts`` itself for an absent one.
        experts: E.
    """
    tokens, top_k = top_k_index_TK.shape
    device = top_k_index_TK.device
    sorted_M, order_M = torch.sort(top_k_index_TK.reshape(-1), stable=True)
    inverse_M = torch.empty_like(order_M, dtype=torch.int32)
    inverse_M[order_M] = torch.arange(tokens * top_k, device=device, dtype=torch.int32)
    # searchsorted, not bincount: bincount reads its maximum back to the host.
    offset_E1 = torch.searchsorted(sorted_M, torch.arange(experts + 1, device=device, dtype=sorted_M.dtype))
    return Routing(
        top_k=top_k,
        offset_E1=offset_E1.int(),
        flat_M=order_M.int(),
        inverse_TK=inverse_M.view(tokens, top_k),
    )


def tile_map(offset_E1: Tensor, *, rows: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """``tile_expert_B`` and ``tile_row_B`` for row tiles of ``block_rows``.

    The number of tiles depends on the data, and reading it back would stall the device; the grid gets the bound
    ``B = rows // block_rows + min(E, rows)`` instead, and the programs past the true count return at once.
    """
    experts = offset_E1.numel() - 1
    tile_B = torch.arange(rows // block_rows + min(experts, rows), device=offset_E1.device)
    tiles_E = (offset_E1.diff() + block_rows - 1) // block_rows
    tile_end_E = tiles_E.cumsum(0)
    tile_expert_B = torch.searchsorted(tile_end_E, tile_B, right=True)
    first_tile_E1 = torch.cat([tile_end_E.new_zeros(1), tile_end_E])
    tile_row_B = offset_E1[tile_expert_B] + (tile_B - first_tile_E1[tile_expert_B]) * block_rows
    return tile_expert_B.int(), tile_row_B.int()
