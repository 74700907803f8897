import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.routing import build_routing, presorted_routing, tile_map


def make_index(tokens: int, experts: int, *, top_k: int, absent: float) -> torch.Tensor:
    """Distinct experts for a token, the first ones more often; a share ``absent`` of them is replaced by E."""
    generator = torch.Generator().manual_seed(tokens)
    index_TK = (torch.rand(tokens, experts, generator=generator) ** 3).topk(top_k).indices
    return index_TK.where(torch.rand(tokens, top_k, generator=generator) >= absent, experts)


shapes = given(
    tokens=st.integers(0, 70),
    experts=st.integers(1, 12),
    top_k=st.integers(1, 12),
    absent=st.sampled_from([0, 0.4, 1]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@shapes
def test_rows_are_sorted_by_expert_then_token_and_absent_experts_come_last(
    tokens: int, experts: int, top_k: int, absent: float
) -> None:
    index_TK = make_index(tokens, experts, top_k=min(top_k, experts), absent=absent)
    routing = build_routing(index_TK, experts=experts)
    flat = index_TK.flatten().tolist()
    assert routing.flat_M is not None
    assert routing.flat_M.tolist() == sorted(range(len(flat)), key=lambda row: (flat[row], row))
    assert routing.offset_E1.tolist() == [sum(e < expert for e in flat) for expert in range(experts + 1)]
    assert routing.inverse_TK is not None
    assert routing.inverse_TK.shape == index_TK.shape
    assert routing.inverse_TK.flatten()[routing.flat_M.long()].tolist() == list(range(len(flat)))
    assert {t.dtype for t in (routing.flat_M, routing.inverse_TK, routing.offset_E1)} == {torch.int32}
    assert (routing.top_k, routing.experts) == (index_TK.shape[1], experts)


@pytest.mark.parametrize("block_rows", [1, 16, 128])
@settings(max_examples=40, deadline=None, derandomize=True)
@shapes
def test_the_tiles_cover_every_row_of_a_present_expert_exactly_once(
    block_rows: int, tokens: int, experts: int, top_k: int, absent: float
) -> None:
    index_TK = make_index(tokens, experts, top_k=min(top_k, experts), absent=absent)
    routing = build_routing(index_TK, experts=experts)
    tile_expert_B, tile_row_B = tile_map(routing.offset_E1, rows=index_TK.numel(), block_rows=block_rows)
    assert tile_expert_B.shape == tile_row_B.shape
    offset = routing.offset_E1.tolist()
    covered = []
    for expert, row in zip(tile_expert_B.tolist(), tile_row_B.tolist(), strict=True):
        assert expert <= experts
        if expert < experts:
            assert offset[expert] <= row < offset[expert + 1]
            covered += [(r, expert) for r in range(row, min(row + block_rows, offset[expert + 1]))]
    owners = [(row, e) for e in range(experts) for row in range(offset[e], offset[e + 1])]
    assert covered == owners


def test_an_expert_named_twice_by_a_token_has_two_rows() -> None:
    routing = build_routing(torch.tensor([[1, 1], [0, 1]]), experts=2)
    assert routing.offset_E1.tolist() == [0, 1, 4]
    assert routing.inverse_TK is not None
    assert routing.inverse_TK.tolist() == [[1, 2], [0, 3]]


@pytest.mark.parametrize("strange", [-1, 5, 65_536, -(2**40)])
def test_an_index_that_names_no_expert_is_refused_on_cpu_with_its_range(strange: int) -> None:
    index_TK = torch.tensor([[0, 1], [strange, 3]])
    low, high = min(strange, 0), max(strange, 3)
    with pytest.raises(IndexError, match=rf"\[0, 4\), or be 4 for an absent expert; got \[{low}, {high}\]"):
        build_routing(index_TK, experts=4)


@pytest.mark.parametrize("experts", [1, 1000, 40_000])
def test_any_number_of_experts_and_any_strides_are_taken(experts: int) -> None:
    index_KT = torch.randint(experts + 1, (3, 50), generator=torch.Generator().manual_seed(0))
    strided = build_routing(index_KT.T, experts=experts)
    contiguous = build_routing(index_KT.T.int().contiguous(), experts=experts)
    for got, expected in zip(vars(strided).values(), vars(contiguous).values(), strict=True):
        torch.testing.assert_close(got, expected)
    assert strided.flat_M is not None
    sorted_M = index_KT.T.flatten()[strided.flat_M.long()]
    assert sorted_M.tolist() == sorted(index_KT.flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_presorted_rows_start_where_those_of_the_experts_before_end(dtype: torch.dtype) -> None:
    routing = presorted_routing(torch.tensor([3, 0, 5, 1], dtype=dtype))
    assert routing.offset_E1.tolist() == [0, 3, 3, 8, 9]
    assert routing.offset_E1.dtype == torch.int32
    assert (routing.flat_M, routing.inverse_TK, routing.top_k, routing.experts) == (None, None, 1, 4)


def test_rows_past_the_counts_of_presorted_experts_belong_to_no_tile() -> None:
    routing = presorted_routing(torch.tensor([3, 0, 2]))
    tile_expert_B, tile_row_B = tile_map(routing.offset_E1, rows=16, block_rows=2)
    assert tile_expert_B.tolist() == [0, 0, 2] + [3] * 8
    assert tile_row_B.tolist()[:3] == [0, 2, 3]
