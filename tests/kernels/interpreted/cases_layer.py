"""The whole experts layer by Triton, gradients included, against fp64. Run by ``test_interpreted.py``."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_properties import (
    PROPERTIES,
    Subject,
    rows_that_come_sorted_are_computed_and_padding_is_zero_both_ways,
)
from moe_kernels import backward, experts_reference, forward
from moe_kernels.autograd import experts_backward, experts_forward
from moe_kernels.config import Tile
from moe_kernels.experts import experts_layer
from moe_kernels.routing import Routing
from problems import NAMES, Spread, assert_layer_accurate, make_problem, poisoned_memory, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON = Subject(path="triton", dtype=torch.float32, device=DEVICE)
layer = partial(experts_layer, path="triton")
# (T, E, K, D, F); every edge in one dtype, and one shape in all three
SHAPES: list[tuple[tuple[int, int, int, int, int], Spread, torch.dtype]] = [
    *(((40, 5, 2, 64, 48), "uniform", dtype) for dtype in DTYPES),
    ((33, 12, 4, 40, 12), "uniform", torch.float16),
    ((21, 4, 2, 97, 47), "uniform", torch.bfloat16),
    ((1, 4, 4, 17, 5), "uniform", torch.float32),
    ((9, 3, 3, 16, 1), "uniform", torch.float16),
    ((6, 1, 1, 1, 8), "uniform", torch.bfloat16),
    ((3, 16, 2, 24, 8), "uniform", torch.float32),
    ((70, 3, 1, 33, 20), "one expert", torch.bfloat16),
    ((0, 4, 2, 16, 8), "uniform", torch.float32),
]


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.mark.parametrize("property_of_the_layer", PROPERTIES, ids=lambda check: check.__name__)
def test_the_triton_path_keeps_what_the_layer_promises(property_of_the_layer: Callable) -> None:
    property_of_the_layer(TRITON)


@pytest.mark.parametrize(("shape", "spread", "dtype"), SHAPES, ids=str)
def test_output_and_gradients_are_as_accurate_as_plain_torch(
    shape: tuple[int, int, int, int, int], spread: Spread, dtype: torch.dtype
) -> None:
    tokens, experts, top_k, hidden, width = shape
    problem = make_problem(tokens, experts, top_k=top_k, hidden=hidden, width=width, spread=spread)
    # The interpreter truncates fp32 -> bf16 where a GPU rounds to nearest: up to an eps more at each store on the way.
    slack = 2 if dtype is torch.bfloat16 and DEVICE == "cpu" else 0.5
    if tokens * top_k < 40:
        slack = 4  # a handful of numbers may cancel, or be exact in one order by luck
    assert_layer_accurate(problem, layer, dtype, slack=slack, device=DEVICE)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 24),
    experts=st.integers(1, 5),
    top_k=st.integers(1, 4),
    hidden=st.integers(1, 50),
    width=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES),
)
def test_output_and_gradients_are_as_accurate_as_plain_torch_on_ragged_shapes(
    tokens: int, experts: int, top_k: int, hidden: int, width: int, dtype: torch.dtype
) -> None:
    problem = make_problem(tokens, experts, top_k=min(top_k, experts), hidden=hidden, width=width)
    assert_layer_accurate(problem, layer, dtype, slack=4, device=DEVICE)


@pytest.mark.parametrize("blocks", [(16, 32, 16, 1), (64, 16, 32, 3), (32, 128, 64, 8)])
def test_every_tile_computes_the_same(blocks: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    block_m, block_n, block_k, group_m = blocks
    shape = Tile(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=4, num_stages=2, group_m=group_m)
    for module in (forward, backward):
        monkeypatch.setattr(module, "tile", lambda kernel, **_: shape)
    problem = make_problem(36, 3, top_k=2, hidden=24, width=36)
    assert_layer_accurate(problem, layer, torch.float32, slack=0.5, device=DEVICE)


@pytest.mark.parametrize(
    ("counts", "padding", "dtype"),
    [
        ((3, 0, 70, 1), 6, torch.float32),
        ((0, 0, 0, 0), 5, torch.float32),
        ((16, 16, 16, 32), 0, torch.float32),
        ((7, 0, 16, 4), 3, torch.bfloat16),
    ],
)
def test_rows_that_come_sorted_are_computed_and_padding_is_zero_both_ways(
    counts: Sequence[int], padding: int, dtype: torch.dtype
) -> None:
    subject = Subject(path="triton", dtype=dtype, device=DEVICE)
    rows_that_come_sorted_are_computed_and_padding_is_zero_both_ways(subject, counts=counts, padding=padding)


def test_absent_experts_add_nothing_and_their_rows_and_weights_are_never_read() -> None:
    p = make_problem(20, 8, top_k=3, hidden=40, width=20).rounded(torch.float32)
    absent_TK = p.top_k_index_TK > 4
    exact = p.replaced(top_k_weights_TK=p.top_k_weights_TK.masked_fill(absent_TK, 0)).run(
        experts_reference, torch.float64
    )
    expected = {name: tensor[:5] if name in ("dw13", "dw2") else tensor for name, tensor in exact.items()}
    expected["dweights"] = exact["dweights"].masked_fill(absent_TK, 0)
    here = p.replaced(
        w13_EGD=p.w13_EGD[:5],
        w2_EDF=p.w2_EDF[:5],
        top_k_index_TK=p.top_k_index_TK.clamp(max=5),
        top_k_weights_TK=p.top_k_weights_TK.masked_fill(absent_TK, float("inf")),
    )
    got = TRITON.run(here)
    assert (got["dweights"][absent_TK] == 0).all()
    for name, tensor in got.items():
        assert relative_error(tensor, expected[name]) < 1e-6, name


def test_a_token_or_an_expert_of_nan_spoils_no_other() -> None:
    p = make_problem(16, 4, top_k=1, hidden=24, width=12).rounded(torch.float32)
    p.top_k_index_TK[0] = 2
    expected = TRITON.run(p)
    spoiled = p.replaced(x_TD=p.x_TD.clone(), w13_EGD=p.w13_EGD.clone(), w2_EDF=p.w2_EDF.clone())
    spoiled.x_TD[0] = spoiled.w2_EDF[2] = float("nan")
    spoiled.w13_EGD[2] = float("inf")
    got = TRITON.run(spoiled)
    others_T, others_E = p.top_k_index_TK[:, 0] != 2, torch.tensor([0, 1, 3])
    for name in NAMES:
        kept = others_E if name in ("dw13", "dw2") else others_T
        assert torch.equal(got[name][kept], expected[name][kept]), name


def test_k_rows_of_a_token_are_added_in_the_order_of_k() -> None:
    y_MD = torch.tensor([[1.0], [1e8], [-1e8], [1.0]], device=DEVICE)
    out_TD = torch.empty(1, 1, device=DEVICE)
    routing = Routing(
        top_k=4,
        offset_E1=torch.tensor([0, 4], dtype=torch.int32, device=DEVICE),
        inverse_TK=torch.tensor([[1, 0, 2, 3]], dtype=torch.int32, device=DEVICE),
    )
    forward.combine(y_MD, out_TD, weights_TK=None, routing=routing)
    assert out_TD.item() == 1.0  # ((1e8 + 1) - 1e8) + 1 in fp32


def test_both_operators_are_what_their_schemas_and_fakes_say_and_inference_keeps_nothing() -> None:
    p = make_problem(6, 2, top_k=2, hidden=16, width=8).rounded(torch.float16)
    x, w13, w2, weights, grad_out = (
        t.to(DEVICE) for t in (p.x_TD, p.w13_EGD, p.w2_EDF, p.top_k_weights_TK, p.grad_out_TD)
    )
    args = x, w13, None, w2, p.top_k_index_TK.to(DEVICE), weights, None, "triton"
    out, hidden, *routing = experts_forward(*args, True)
    same_out, *kept = experts_forward(*args, False)
    assert torch.equal(same_out, out)
    assert sum(tensor.numel() for tensor in kept) == 0
    checks = ("test_schema", "test_faketensor")
    needs = [True] * 4
    gradient = (grad_out, x, w13, None, w2, hidden, None, weights, *routing, "triton", *needs)
    torch.library.opcheck(experts_backward, gradient, test_utils=checks)
    torch.library.opcheck(experts_forward, (*args, True), test_utils=checks)
