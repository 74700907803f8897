"""Routing metadata of the Triton path: who computes which tile of which expert. Torch operators, no host sync.

Glossary (M = T*K routed rows, E experts, K top-k; "flat" is the position ``t*K + k``, "sorted" that by expert):

    token_M          sorted -> token
    inverse_TK       flat -> sorted
    offset_E1        first sorted row of each expert, and M
    tile_expert_B    tile -> expert; E for the tiles past the last real one
    tile_row_B       tile -> first sorted row
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The index arrays of the glossary above, on the device of the routing."""

    token_M: Tensor
    inverse_TK: Tensor
    offset_E1: Tensor
    tile_expert_B: Tensor
    tile_row_B: Tensor


def build_routing(top_k_index_TK: Tensor, *, experts: int, block_rows: int) -> Routing:
    """Sorts the rows by expert (stable, so the result is unique) and cuts each expert into tiles.

    The number of tiles depends on the data, and reading it back would stall the device; the grid gets the bound
    ``M // block_rows + min(E, M)`` instead, and the programs past the true count return at once.

    Args:
        top_k_index_TK: chosen experts, integers in ``[0, E)``, (T, K).
        experts: E.
        block_rows: rows of one tile.
    """
    tokens, top_k = top_k_index_TK.shape
    rows, device = tokens * top_k, top_k_index_TK.device
    sorted_M, order_M = torch.sort(top_k_index_TK.reshape(-1), stable=True)
    inverse_M = torch.empty_like(order_M)
    inverse_M[order_M] = torch.arange(rows, device=device)
    # searchsorted, not bincount: bincount reads its maximum back to the host.
    offset_E1 = torch.searchsorted(sorted_M, torch.arange(experts + 1, device=device, dtype=sorted_M.dtype))

    tiles_E = (offset_E1.diff() + block_rows - 1) // block_rows
    tile_end_E = tiles_E.cumsum(0)
    tile_B = torch.arange(rows // block_rows + min(experts, rows), device=device)
    tile_expert_B = torch.searchsorted(tile_end_E, tile_B, right=True)
    first_tile_E1 = torch.cat([tile_end_E.new_zeros(1), tile_end_E])
    tile_row_B = offset_E1[tile_expert_B] + (tile_B - first_tile_E1[tile_expert_B]) * block_rows
    return Routing(
        token_M=order_M // max(top_k, 1),
        inverse_TK=inverse_M.view(tokens, top_k),
        offset_E1=offset_E1,
        tile_expert_B=tile_expert_B,
        tile_row_B=tile_row_B,
    )
