"""Tensors of more than 2^31 elements: memory is mapped but not touched, so only a few pages of gigabytes exist."""

from typing import Any

import torch
from problems import relative_error
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAR = 2**30  # elements, of which three rows pass 2^31
BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "GROUP_M": 1, "INTERPRETED": DEVICE == "cpu"}


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def far_tile(row: int, *, rows: int, expert: int, experts: int) -> dict[str, Any]:
    """The shared arguments of a launch with one row tile of one expert."""
    offset_E1 = index(*[row] * (expert + 1), *[row + rows] * (experts - expert))
    maps = {"tile_expert_B": index(expert), "tile_row_B": index(row), "offset_E1": offset_E1}
    return maps | BLOCKS | {"n_row_tiles": 1, "E": experts}


def half(*shape: int) -> Tensor:
    """Unwritten fp16."""
    return torch.empty(*shape, dtype=torch.float16, device=DEVICE)


def normal(*shape: int) -> Tensor:
    """Random fp16 of order one."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(torch.float16).to(DEVICE)


def assert_close(got: Tensor, exact: Tensor) -> None:
    assert relative_error(got, exact) < torch.finfo(torch.float16).eps
