"""The whole experts layer by Triton, gradients included, against fp64. Run by ``test_interpreted.py``."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_properties import (
    PROPERTIES,
    Subject,
    rows_that_come_sorted_are_computed_and_padding_is_zero_both_ways,
    saved_bytes,
)
from moe_kernels.autograd import experts_backward, experts_forward
from moe_kernels.experts import experts_layer
from problems import NAMES, Spread, assert_layer_accurate, make_problem, poisoned_memory
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (T, E, K, D, F)
SHAPES: list[tuple[tuple[int, int, int, int, int], Spread]] = [
    ((40, 5, 2, 64, 48), "uniform"),
    ((21, 4, 2, 97, 47), "uniform"),
    ((1, 4, 4, 17, 5), "uniform"),
    ((9, 3, 3, 16, 1), "uniform"),
    ((3, 16, 2, 24, 8), "uniform"),
    ((70, 3, 1, 33, 20), "one expert"),
    ((0, 4, 2, 16, 8), "uniform"),
]


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.mark.parametrize("property_of_the_layer", PROPERTIES, ids=lambda check: check.__name__)
def test_the_triton_path_keeps_what_the_layer_promises(property_of_the_layer: Callable) -> None:
    property_of_the_layer(Subject(path="triton", dtype=torch.float32, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "spread"), SHAPES)
def test_output_and_gradients_are_as_accurate_as_plain_torch(
    shape: tuple[int, int, int, int, int], spread: Spread, dtype: torch.dtype
) -> None:
    tokens, experts, top_k, hidden, width = shape
    problem = make_problem(tokens, experts, top_k=top_k, hidden=hidden, width=width, spread=spread)
    # The interpreter truncates fp32 -> bf16 where a GPU rounds to nearest: up to an eps more at each store on the way.
    slack = 2 if dtype is torch.bfloat16 and DEVICE == "cpu" else 0.5
    if tokens * top_k < 40:
        slack = 4  # a handful of numbers may cancel, or be exact in one order by luck
    assert_layer_accurate(problem, partial(experts_layer, path="triton"), dtype, slack=slack, device=DEVICE)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 30),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    hidden=st.integers(1, 40),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_output_and_gradients_are_as_accurate_as_plain_torch_on_ragged_shapes(
    tokens: int, experts: int, top_k: int, hidden: int, width: int, dtype: torch.dtype
) -> None:
    problem = make_problem(tokens, experts, top_k=min(top_k, experts), hidden=hidden, width=width)
    assert_layer_accurate(problem, partial(experts_layer, path="triton"), dtype, slack=4, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_come_sorted_are_computed_and_padding_is_zero_both_ways(dtype: torch.dtype) -> None:
    rows_that_come_sorted_are_computed_and_padding_is_zero_both_ways(
        Subject(path="triton", dtype=dtype, device=DEVICE)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_tokens_pre_activations_and_twelve_bytes_a_row(dtype: torch.dtype) -> None:
    p = make_problem(20, 4, top_k=2, hidden=16, width=8)
    kept, weights = saved_bytes(Subject(path="triton", dtype=dtype, device=DEVICE), p)
    rows = 20 * 2
    offsets = 4 * (4 + 1)
    assert kept == dtype.itemsize * (20 * 16 + rows * 2 * 8) + 12 * rows + offsets
    assert [tuple(w.shape) for w in weights] == [(4, 16, 16), (4, 16, 8)]


def test_both_operators_are_what_their_schemas_and_fakes_say() -> None:
    p = make_problem(12, 4, top_k=2, hidden=16, width=8).rounded(torch.float32)
    x, w13, w2, weights, grad_out = (
        t.to(DEVICE) for t in (p.x_TD, p.w13_EGD, p.w2_EDF, p.top_k_weights_TK, p.grad_out_TD)
    )
    args = x, w13, None, w2, p.top_k_index_TK.to(DEVICE), weights, None, "triton", True
    _, hidden, *routing = experts_forward(*args)
    torch.library.opcheck(
        experts_backward, (grad_out, x, w13, None, w2, hidden, None, weights, *routing, "triton", *[True] * 4)
    )
    torch.library.opcheck(
        experts_forward, [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    )


def test_a_compiled_layer_gives_the_bits_of_the_eager_one() -> None:
    layer = partial(experts_layer, path="triton")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (26, 13):
        p = make_problem(tokens, 6, top_k=3, hidden=24, width=8)
        eager, got = (p.run(f, torch.float32, device=DEVICE) for f in (layer, compiled))
        assert all(torch.equal(got[name], eager[name]) for name in NAMES)
