"""The Triton forward against fp64: on the GPU where there is one, otherwise in Triton's interpreter.

Not collected by name: ``test_grouped.py`` runs this file in a process of its own, because ``TRITON_INTERPRET`` changes
what ``triton.jit`` means for the whole process.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_cases.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels import experts_reference
from moe_kernels.grouped import experts_grouped
from problems import Spread, assert_as_accurate_as_torch, make_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(p: object, layer: object, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    names = ("x_TD", "w13_EGD", "w2_EDF", "top_k_index_TK", "top_k_weights_TK")
    tensors = [getattr(p, name).to(device) for name in names]
    cast = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    return {"out": layer(*cast).cpu()}  # type: ignore[operator]


def assert_accurate(
    tokens: int, experts: int, *, top_k: int, hidden: int, width: int, dtype: torch.dtype, spread: Spread = "uniform"
) -> None:
    p = make_problem(tokens, experts, top_k=top_k, hidden=hidden, width=width, spread=spread).rounded(dtype)
    # The interpreter truncates fp32 -> bf16 where a GPU rounds to nearest: one more unit in the last place.
    slack = torch.finfo(dtype).eps * (1 if dtype is torch.bfloat16 and DEVICE == "cpu" else 0.5)
    assert_as_accurate_as_torch(
        run(p, experts_grouped, dtype, DEVICE),
        plain=run(p, experts_reference, dtype, "cpu"),
        exact=run(p, experts_reference, torch.float64, "cpu"),
        slack=slack,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "spread"),
    [
        ((64, 8, 2, 64, 48), "uniform"),
        ((33, 12, 4, 40, 12), "uniform"),
        ((70, 4, 2, 97, 47), "uniform"),
        ((1, 4, 4, 17, 5), "uniform"),
        ((40, 6, 1, 32, 16), "first half"),
        ((50, 5, 1, 48, 24), "one expert"),
        ((9, 3, 3, 16, 1), "uniform"),
        ((6, 1, 1, 1, 8), "uniform"),
        ((300, 2, 1, 33, 20), "one expert"),
    ],
)
def test_the_output_is_as_accurate_as_plain_torch(
    shape: tuple[int, int, int, int, int], spread: Spread, dtype: torch.dtype
) -> None:
    tokens, experts, top_k, hidden, width = shape
    assert_accurate(tokens, experts, top_k=top_k, hidden=hidden, width=width, dtype=dtype, spread=spread)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    hidden=st.integers(1, 70),
    width=st.integers(1, 40),
)
def test_the_output_is_as_accurate_as_plain_torch_on_ragged_shapes(
    tokens: int, experts: int, top_k: int, hidden: int, width: int
) -> None:
    top_k = min(top_k, experts)
    assert_accurate(tokens, experts, top_k=top_k, hidden=hidden, width=width, dtype=torch.float32)


def test_rows_and_columns_past_the_edge_are_never_read_into_the_result() -> None:
    p = make_problem(21, 3, top_k=2, hidden=19, width=11).rounded(torch.float32)
    poisoned = torch.full((21 + 64, 19), float("nan"))
    poisoned[:21] = p.x_TD
    weights = torch.full((5, 22, 19), float("nan"))
    weights[:3] = p.w13_EGD
    tensors = [poisoned[:21], weights[:3], p.w2_EDF, p.top_k_index_TK, p.top_k_weights_TK]
    assert experts_grouped(*(tensor.to(DEVICE) for tensor in tensors)).isfinite().all()


def test_equal_inputs_give_equal_bits() -> None:
    p = make_problem(40, 6, top_k=3, hidden=48, width=24)
    first, second = (run(p, experts_grouped, torch.float32, DEVICE)["out"] for _ in range(2))
    assert torch.equal(first, second)
