"""The routing kernels give the bits of the torch operators: on the GPU where there is one, otherwise interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.routing import (
    Routing,
    build_routing,
    sort_rows_torch,
    sort_rows_triton,
    tile_map,
    tile_map_torch,
    tile_map_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CANARY = -77


def make_index(tokens: int, experts: int, *, top_k: int, spread: str, seed: int = 0) -> torch.Tensor:
    """Experts may repeat within a token, and E itself is among them unless all go to one."""
    generator = torch.Generator().manual_seed(seed)
    if spread == "one expert":
        return torch.full((tokens, top_k), experts // 2)
    if spread == "all absent":
        return torch.full((tokens, top_k), experts)
    skewed = torch.rand(tokens, top_k, generator=generator) ** 3
    return (skewed * (experts + 1)).long()


def assert_same(got: Routing, expected: Routing) -> None:
    assert got.top_k == expected.top_k
    for name in ("offset_E1", "flat_M", "inverse_TK"):
        ours, theirs = getattr(got, name).cpu(), getattr(expected, name)
        assert ours.dtype == theirs.dtype == torch.int32
        assert torch.equal(ours, theirs), name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 130),
    experts=st.one_of(st.integers(1, 20), st.integers(1, 1024)),
    top_k=st.integers(1, 6),
    spread=st.sampled_from(["skewed", "skewed", "one expert", "all absent"]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    block_rows=st.sampled_from([16, 32, 64, 128]),
)
def test_rows_and_tiles_are_those_of_the_torch_operators(
    tokens: int, experts: int, top_k: int, spread: str, dtype: torch.dtype, block_rows: int
) -> None:
    index_TK = make_index(tokens, experts, top_k=top_k, spread=spread, seed=tokens)
    expected = sort_rows_torch(index_TK, experts=experts)
    assert_same(sort_rows_triton(index_TK.to(DEVICE, dtype), experts=experts), expected)
    offset_E1 = expected.offset_E1
    tiles = tile_map_triton(offset_E1.to(DEVICE), rows=index_TK.numel(), block_rows=block_rows)
    for got, want in zip(tiles, tile_map_torch(offset_E1, rows=index_TK.numel(), block_rows=block_rows), strict=True):
        assert got.dtype == torch.int32
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "spread"),
    [
        (3000, 100, 2, "skewed"),  # more tiles than one load of counts takes
        (17_000, 3, 1, "one expert"),  # tiles of 256 rows
        (1024, 64, 4, "skewed"),  # the last tile is full
    ],
)
def test_rows_of_many_tiles_are_placed_behind_those_of_earlier_tiles(
    tokens: int, experts: int, top_k: int, spread: str
) -> None:
    index_TK = make_index(tokens, experts, top_k=top_k, spread=spread)
    got = sort_rows_triton(index_TK.to(DEVICE), experts=experts)
    assert_same(got, sort_rows_torch(index_TK, experts=experts))


def test_more_tiles_than_a_program_maps_are_all_mapped() -> None:
    offset_E1 = torch.arange(0, 1201, 2, dtype=torch.int32)
    got = tile_map_triton(offset_E1.to(DEVICE), rows=1200, block_rows=16)
    for ours, theirs in zip(got, tile_map_torch(offset_E1, rows=1200, block_rows=16), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("strange", [-1, -(2**40), 6, 2**32 + 1])
def test_an_index_that_names_no_expert_is_absent_on_the_device(strange: int) -> None:
    index_TK = make_index(40, 5, top_k=3, spread="skewed")
    expected = sort_rows_torch(index_TK, experts=5)
    assert_same(sort_rows_triton(index_TK.where(index_TK < 5, strange).to(DEVICE), experts=5), expected)


@pytest.mark.parametrize("layout", ["transposed", "every other column", "expanded"])
def test_the_index_may_have_any_strides(layout: str) -> None:
    wide_TK = make_index(50, 7, top_k=6, spread="skewed").to(DEVICE)
    index_TK = {
        "transposed": wide_TK.T.contiguous().T,
        "every other column": wide_TK[:, ::2],
        "expanded": wide_TK[:, :1].expand(-1, 4),
    }[layout]
    assert_same(sort_rows_triton(index_TK, experts=7), sort_rows_torch(index_TK.cpu().contiguous(), experts=7))


def test_no_rows_make_no_tiles() -> None:
    routing = build_routing(torch.empty(0, 4, dtype=torch.long, device=DEVICE), experts=3)
    assert routing.offset_E1.tolist() == [0, 0, 0, 0]
    tile_expert_B, tile_row_B = tile_map(routing.offset_E1, rows=0, block_rows=16)
    assert tile_expert_B.numel() == tile_row_B.numel() == 0


def test_nothing_is_written_beside_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = []

    def guarded(shape: tuple[int, ...] | int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        numel = torch.Size([shape] if isinstance(shape, int) else shape).numel()
        buffers.append(torch.full((numel + 512,), CANARY, dtype=dtype, device=device))
        return buffers[-1][256 : 256 + numel].view(shape)

    index_TK = make_index(90, 9, top_k=3, spread="skewed").to(DEVICE)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", guarded)
        patched.setattr(torch, "empty_like", lambda like: guarded(like.shape, dtype=like.dtype, device=like.device))
        routing = sort_rows_triton(index_TK, experts=9)
        tile_map_triton(routing.offset_E1, rows=270, block_rows=16)
    assert len(buffers) == 6  # counts, offsets, both orders, both maps
    for buffer in buffers:
        assert (buffer[:256] == CANARY).all()
        assert (buffer[-256:] == CANARY).all()
        assert (buffer[256:-256] != CANARY).all()


@pytest.mark.parametrize("name", ["sort_rows_torch", "tile_map_torch"])
def test_the_kernels_run_without_the_torch_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"moe_kernels.routing.{name}")
    routing = build_routing(torch.tensor([[0, 1]], device=DEVICE), experts=2)
    tile_map(routing.offset_E1, rows=2, block_rows=16)
