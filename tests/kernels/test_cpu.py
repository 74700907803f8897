"""The CPU twin below autograd: chunks, layouts, separate up projections, absent experts, and which path is chosen."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from moe_kernels import choose_regime, sorted_path, sorted_rows
from moe_kernels.experts import experts_layer
from moe_kernels.routing import Routing, build_routing
from problems import NAMES, Problem, Spread, assert_layer_accurate, make_problem, poisoned_memory

DTYPES = (torch.float32, torch.bfloat16)  # sums are kept apart in half precision
NARROW, WIDE = 24, 72  # on either side of the width at which the layout changes
NEEDS_ALL = {"need_x": True, "need_w13": True, "need_w2": True, "need_weights": True}


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    with poisoned_memory():
        yield


def run(p: Problem, routing: Routing, *, dtype: torch.dtype, separate: bool = False) -> list[torch.Tensor | None]:
    """The output and the gradients of the sorted path, called as the operators call it."""
    x, w13, w2, weights, grad_out = (
        t.to(dtype) for t in (p.x_TD, p.w13_EGD, p.w2_EDF, p.top_k_weights_TK, p.grad_out_TD)
    )
    gate, up = (w.contiguous() for w in w13.chunk(2, dim=1)) if separate else (w13, None)
    where = {"weights_TK": None if routing.flat_M is None else weights, "routing": routing}
    out, hidden = sorted_path.forward(x, gate, up, w2, **where)
    rows = x.shape[0]
    if routing.flat_M is not None:
        rows = sorted_rows.hidden_rows(rows * routing.top_k, experts=routing.experts, dtype=dtype, device="cpu")
    assert hidden.shape == (rows, 2 * w2.shape[2])
    needs = NEEDS_ALL | {"need_weights": routing.flat_M is not None}
    return [out, *sorted_path.backward(grad_out, x, gate, up, w2, hidden, **where, **needs)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("spread", ["uniform", "one expert", "first half"])
@pytest.mark.parametrize("rows", [1, 64])
def test_chunks_of_any_number_of_experts_are_as_accurate_as_plain_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int, spread: Spread, rows: int
) -> None:
    monkeypatch.setattr(sorted_rows, "_CHUNK_ROWS", rows)
    p = make_problem(60, 9, top_k=3, hidden=40, width=width, spread=spread)
    assert_layer_accurate(p, partial(experts_layer, path="sorted"), dtype, slack=0.5, device="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_separate_up_projections_give_the_gradients_of_fused_ones(dtype: torch.dtype, width: int) -> None:
    p = make_problem(40, 6, top_k=2, hidden=32, width=width)
    routing = build_routing(p.top_k_index_TK, experts=6)
    out, x, w13, w3, *rest = run(p, routing, dtype=dtype)
    assert w3 is None
    assert w13 is not None
    fused = [out, x, *w13.chunk(2, dim=1), *rest]
    tolerance = 8 * torch.finfo(dtype).eps
    for got, expected in zip(run(p, routing, dtype=dtype, separate=True), fused, strict=True):
        assert got is not None
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_the_routing_weight_of_an_absent_expert_is_never_read(dtype: torch.dtype, width: int) -> None:
    p = make_problem(30, 5, top_k=3, hidden=24, width=width)
    absent_TK = p.top_k_index_TK == 2
    routing = build_routing(p.top_k_index_TK.masked_fill(absent_TK, 5), experts=5)
    clean, poisoned = (
        run(p.replaced(top_k_weights_TK=p.top_k_weights_TK.masked_fill(absent_TK, weight)), routing, dtype=dtype)
        for weight in (0.5, float("nan"))
    )
    for got, expected in zip(poisoned, clean, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or expected is None or torch.equal(got, expected)
    assert (poisoned[-1][absent_TK] == 0).all()  # type: ignore[index]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_behind_sorted_rows_is_not_read_and_comes_out_as_zero(dtype: torch.dtype) -> None:
    p = make_problem(24, 3, top_k=1, hidden=16, width=NARROW)
    routing = Routing(top_k=1, offset_E1=torch.tensor([0, 7, 7, 19], dtype=torch.int32))
    rows = torch.arange(24)[:, None] < 19
    poison = {name: getattr(p, name).where(rows, float("nan")) for name in ("x_TD", "grad_out_TD")}
    clean, poisoned = (run(q, routing, dtype=dtype) for q in (p, p.replaced(**poison)))
    for got, expected in zip(poisoned[:5], clean[:5], strict=True):
        assert got is None or torch.equal(got, expected)  # type: ignore[arg-type]
    for tensor in poisoned[:2]:
        assert (tensor[19:] == 0).all()  # type: ignore[index]
    assert poisoned[5] is None


POISONS = (float("nan"), float("inf"), -float("inf"), 6e4)


@given(
    dtype=st.sampled_from(DTYPES),
    poison=st.sampled_from(POISONS),
    where=st.sampled_from(("x_TD", "w13_EGD", "w2_EDF", "grad_out_TD")),
    row=st.integers(0, 5),
    spread=st.sampled_from(("uniform", "first half", "one expert")),
    absent=st.booleans(),
    seed=st.integers(0, 3),
    wanted=st.sets(st.sampled_from(NAMES[1:])),
)
@example(torch.float32, float("nan"), "w13_EGD", 5, "first half", False, 0, set(NAMES[1:]))  # chosen by no token
@example(torch.float16, 6e4, "w13_EGD", 0, "uniform", False, 0, set(NAMES[1:]))  # overflows for who did not choose it
@settings(deadline=None, max_examples=40)
def test_an_expert_reaches_no_token_that_did_not_choose_it_whatever_it_holds(
    dtype: torch.dtype, poison: float, where: str, row: int, spread: Spread, absent: bool, seed: int, wanted: set[str]
) -> None:
    """Compared with the sorted path, which computes the chosen experts only."""
    p = make_problem(20, 6, top_k=2, hidden=16, width=8, spread=spread, seed=seed)
    poisoned = getattr(p, where).clone()
    poisoned[row, ..., 3] = poison
    p = p.replaced(**{where: poisoned})
    if absent:
        p = p.replaced(top_k_index_TK=p.top_k_index_TK.masked_fill(p.top_k_index_TK == 1, 6))
    dense, expected = (p.run(partial(experts_layer, path=path), dtype, wanted=wanted) for path in ("dense", "sorted"))
    elsewhere_T = torch.ones(20, dtype=torch.bool)
    if dtype is torch.float16 and poison == 6e4:  # near its largest number, rounding decides what overflows
        if where in ("x_TD", "grad_out_TD"):
            return
        elsewhere_T = (p.top_k_index_TK != row).all(1)
        expected = {name: tensor for name, tensor in expected.items() if name not in ("dw13", "dw2")}
    for name, tensor in expected.items():
        got, tensor = (x if name in ("dw13", "dw2") else x[elsewhere_T] for x in (dense[name], tensor))
        largest = max([1.0, *tensor[tensor.isfinite()].abs().tolist()])
        tolerance = 256 * torch.finfo(dtype).eps * largest  # sums in another order
        torch.testing.assert_close(got, tensor, rtol=0, atol=tolerance, equal_nan=True, msg=name)


@pytest.mark.parametrize("path", ["sorted", "dense", None])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-1, 7])
def test_an_index_out_of_range_is_the_same_error_on_every_path(
    path: str | None, dtype: torch.dtype, wrong: int
) -> None:
    p = make_problem(20, 6, top_k=2, hidden=16, width=8)
    p.top_k_index_TK[3, 1] = wrong
    p = p.replaced(top_k_index_TK=p.top_k_index_TK.to(dtype))
    with pytest.raises(IndexError, match=r"top_k_index must lie in \[0, 6\), or be 6 for an absent expert; got"):
        p.run(partial(experts_layer, path=path), torch.float32)


@pytest.mark.parametrize(
    ("tokens", "shape", "dtype", "path"),
    [
        (1024, (96, 32, 12), torch.bfloat16, "dense"),
        (1, (96, 32, 12), torch.bfloat16, "sorted"),
        (1024, (96, 32, 12), torch.float32, "sorted"),
        (1024, (48, 16, 24), torch.bfloat16, "sorted"),
        (1024, (48, 16, 24), torch.float32, "sorted"),
        (1024, (16, 4, 344), torch.bfloat16, "sorted"),
        (1024, (8, 2, 704), torch.float32, "sorted"),
        (1024, (8, 8, 704), torch.float32, "dense"),
    ],
)
def test_very_narrow_experts_of_many_tokens_are_computed_densely_and_others_sorted(
    tokens: int, shape: tuple[int, int, int], dtype: torch.dtype, path: str
) -> None:
    experts, top_k, width = shape
    assert choose_regime(experts, top_k, width=width, tokens=tokens, dtype=dtype) == path


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("last", [1, 31, 33])
def test_what_lies_behind_the_rows_of_the_last_expert_is_in_no_gradient(last: int, width: int) -> None:
    """The chunk's buffer is as full as it gets, and the last expert has an odd number of rows."""
    rows = 256 - 32
    index_TK = torch.tensor([0] * (rows - last) + [1] * last)[:, None]
    generator = torch.Generator().manual_seed(0)
    x, w13, w2 = (
        torch.randn(shape, generator=generator).bfloat16().requires_grad_()
        for shape in ((rows, 64), (2, 2 * width, 64), (2, 64, width))
    )
    out = experts_layer(x, w13, w2, index_TK, torch.ones(rows, 1).bfloat16(), path="sorted")
    for gradient in torch.autograd.grad(out.float().square().sum(), (x, w13, w2)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 8), (2, 3)])
def test_one_or_two_tokens_without_gradients_are_as_accurate_as_any_and_run_without_routing(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int, top_k: int
) -> None:
    p = make_problem(tokens, 9, top_k=top_k, hidden=40, width=WIDE)
    x, w13, w2, weights = (t.to(dtype) for t in (p.x_TD, p.w13_EGD, p.w2_EDF, p.top_k_weights_TK))
    index = p.top_k_index_TK.clone()
    index[-1, -1] = 9  # absent
    expected = experts_layer(x, w13, w2, index, weights, path="sorted")
    with monkeypatch.context() as patched:
        patched.setattr("moe_kernels.autograd.experts_forward", None)
        alone = experts_layer(x, w13, w2, index, weights)
    tolerance = 8 * torch.finfo(dtype).eps * x.abs().max().item()
    torch.testing.assert_close(alone, expected, rtol=0, atol=tolerance)
    with pytest.raises(IndexError, match=r"top_k_index must lie in \[0, 9\)"):
        experts_layer(x, w13, w2, index + 1, weights)


def test_the_rows_of_an_expert_are_rounded_up_to_few_numbers() -> None:
    rounded = [sorted_rows.rounded(rows) for rows in range(2049)]
    assert all(rows <= more <= rows + max(7, rows // 16) for rows, more in enumerate(rounded))
    assert len(set(rounded)) < 100
