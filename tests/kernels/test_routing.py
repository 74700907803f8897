import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.routing import build_routing


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 70),
    experts=st.integers(1, 12),
    top_k=st.integers(1, 12),
    block_rows=st.sampled_from([1, 16]),
)
def test_the_tiles_cover_every_routed_row_of_its_expert_exactly_once(
    tokens: int, experts: int, top_k: int, block_rows: int
) -> None:
    top_k = min(top_k, experts)
    generator = torch.Generator().manual_seed(tokens)
    index_TK = (torch.rand(tokens, experts, generator=generator) ** 3).topk(top_k).indices
    routing = build_routing(index_TK, experts=experts, block_rows=block_rows)
    covered = []
    for expert, row in zip(routing.tile_expert_B.tolist(), routing.tile_row_B.tolist(), strict=True):
        if expert < experts:
            end = min(row + block_rows, int(routing.offset_E1[expert + 1]))
            assert row < end
            covered += [(r, expert) for r in range(row, end)]
    assert [row for row, _ in covered] == list(range(tokens * top_k))
    for row, expert in covered:
        token = int(routing.token_M[row])
        k = routing.inverse_TK[token].tolist().index(row)
        assert index_TK[token, k] == expert
