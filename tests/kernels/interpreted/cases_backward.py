"""The Triton backward against fp64: every gradient. Run by ``test_interpreted.py``."""

import itertools
from unittest.mock import Mock

import pytest
import torch
from backward_problems import (
    DEVICE,
    NEEDS,
    assert_equal_bits,
    gradients,
    small_problem,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels import backward, experts_reference, forward
from moe_kernels.config import Tile
from moe_kernels.routing import Routing
from problems import Problem, Spread, assert_as_accurate_as_torch, make_problem, relative_error
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (T, E, K, D, F)
SHAPES: list[tuple[tuple[int, int, int, int, int], Spread]] = [
    ((48, 8, 2, 64, 48), "uniform"),
    ((33, 12, 4, 40, 12), "uniform"),
    ((70, 4, 2, 97, 47), "uniform"),
    ((1, 4, 4, 17, 5), "uniform"),
    ((40, 6, 1, 32, 16), "first half"),
    ((9, 3, 3, 16, 1), "uniform"),
    ((6, 1, 1, 1, 8), "uniform"),
    ((5, 16, 2, 24, 8), "uniform"),
    ((150, 3, 1, 33, 20), "one expert"),
    ((0, 4, 2, 16, 8), "uniform"),
]


def assert_accurate(p: Problem, dtype: torch.dtype) -> None:
    p = p.rounded(dtype)
    got, exact = gradients(p), p.run(experts_reference, torch.float64)
    assert got.keys() | {"out"} == exact.keys()
    assert all(grad.dtype == dtype for grad in got.values())
    # In units of eps. The interpreter truncates fp32 -> bf16 where a GPU rounds to nearest: one more unit in the last
    # place. On shapes of a few numbers plain torch may be exact by luck.
    slack = 4.0 if p.x_TD.numel() < 64 else 1.0 if dtype is torch.bfloat16 and DEVICE == "cpu" else 0.5
    assert_as_accurate_as_torch(
        got, plain=p.run(experts_reference, dtype), exact=exact, slack=slack * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "spread"), SHAPES)
def test_every_gradient_is_as_accurate_as_plain_torch(
    shape: tuple[int, int, int, int, int], spread: Spread, dtype: torch.dtype, poisoned_memory: None
) -> None:
    tokens, experts, top_k, hidden, width = shape
    assert_accurate(make_problem(tokens, experts, top_k=top_k, hidden=hidden, width=width, spread=spread), dtype)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    hidden=st.integers(1, 70),
    width=st.integers(1, 40),
)
def test_every_gradient_is_as_accurate_as_plain_torch_on_ragged_shapes(
    tokens: int, experts: int, top_k: int, hidden: int, width: int
) -> None:
    top_k = min(top_k, experts)
    assert_accurate(make_problem(tokens, experts, top_k=top_k, hidden=hidden, width=width), torch.float32)


@pytest.mark.parametrize("blocks", [(16, 32, 16, 1), (64, 16, 32, 3), (32, 128, 64, 8)])
def test_every_tile_computes_the_same(blocks: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    block_m, block_n, block_k, group_m = blocks
    shape = Tile(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=4, num_stages=2, group_m=group_m)
    for module in (forward, backward):
        monkeypatch.setattr(module, "tile", lambda kernel, **_: shape)
    assert_accurate(make_problem(60, 3, top_k=2, hidden=40, width=50), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_tensor_descriptors_load_what_pointers_load(
    dtype: torch.dtype, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make_problem(60, 3, top_k=2, hidden=40, width=72).rounded(dtype)
    by_pointers = gradients(p)
    descriptors = Mock(wraps=backward.TensorDescriptor)
    monkeypatch.setattr(forward, "current_arch", lambda: 90)
    monkeypatch.setattr(backward, "TensorDescriptor", descriptors)
    assert_equal_bits(gradients(p), by_pointers)
    assert len(descriptors.mock_calls) == 3  # w2, grad_hidden, w13


def test_only_needed_gradients_are_computed_and_their_bits_do_not_depend_on_the_others(poisoned_memory: None) -> None:
    p = make_problem(9, 2, top_k=2, hidden=33, width=21).rounded(torch.float32)
    everything = gradients(p)
    for needs in itertools.product([False, True], repeat=4):
        wanted = [name for name, need in zip(("dx", "dw13", "dw2", "dweights"), needs, strict=True) if need]
        got = gradients(p, **dict(zip(NEEDS, needs, strict=True)))
        assert_equal_bits(got, {name: everything[name] for name in wanted})


@pytest.mark.parametrize("up_first", [False, True])
def test_separate_gate_and_up_weights_get_the_bits_of_fused_ones(up_first: bool) -> None:
    p = small_problem()
    fused = gradients(p)
    gate, up = (half.contiguous() for half in p.w13_EGD.to(DEVICE).chunk(2, dim=1))
    if up_first:
        up, gate = torch.stack([up, gate])
    got = gradients(p, w13_EGD=gate, w3=up)
    got["dw13"] = torch.cat([got["dw13"], got.pop("dw3")], dim=1)
    assert_equal_bits(got, fused)


def test_master_weights_get_gradients_in_their_own_dtype_straight_from_the_sums() -> None:
    p = small_problem(torch.float16)
    half = gradients(p)
    masters = gradients(
        p,
        w13_EGD=p.w13_EGD.float().to(DEVICE),
        w2_EDF=p.w2_EDF.float().to(DEVICE),
        top_k_weights_TK=p.top_k_weights_TK.float().to(DEVICE),
    )
    assert {name for name, grad in masters.items() if grad.dtype == torch.float32} == {"dw13", "dw2", "dweights"}
    assert not torch.equal(masters["dw2"], half["dw2"].float())
    assert_equal_bits({name: grad.half() for name, grad in masters.items()}, half)


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "one row for all", "one number for all"])
@pytest.mark.parametrize("name", ["x_TD", "grad_out_TD"])
def test_strided_rows_give_the_bits_of_contiguous_ones(name: str, layout: str) -> None:
    p = small_problem()
    rows_TD = getattr(p, name).to(DEVICE)
    if layout == "rows apart":
        strided = torch.full((40, 50), float("nan"), device=DEVICE)[:, 9:42].copy_(rows_TD)
    elif layout == "transposed":
        strided = rows_TD.t().contiguous().t()
    else:
        strided = (rows_TD[:1] if layout == "one row for all" else rows_TD[:1, :1]).expand(40, 33)
    assert_equal_bits(gradients(p, **{name: strided}), gradients(p, **{name: strided.clone()}))


def test_absent_experts_get_no_gradient_and_give_none(poisoned_memory: None) -> None:
    p = make_problem(50, 8, top_k=3, hidden=40, width=20).rounded(torch.float32)
    absent_TK = p.top_k_index_TK > 4
    q = p.replaced(top_k_weights_TK=p.top_k_weights_TK.masked_fill(absent_TK, 0))
    exact = q.run(experts_reference, torch.float64)
    here = p.replaced(
        w13_EGD=p.w13_EGD[:5],
        w2_EDF=p.w2_EDF[:5],
        top_k_index_TK=p.top_k_index_TK.clamp(max=5),
        top_k_weights_TK=p.top_k_weights_TK.masked_fill(absent_TK, float("inf")),
    )
    got = gradients(here)
    assert (got["dweights"][absent_TK] == 0).all()
    expected = {
        "dx": exact["dx"],
        "dw13": exact["dw13"][:5],
        "dw2": exact["dw2"][:5],
        "dweights": exact["dweights"].masked_fill(absent_TK, 0),
    }
    for name, grad in got.items():
        assert relative_error(grad, expected[name]) < 1e-6, name


def test_with_every_expert_absent_all_gradients_are_zero(poisoned_memory: None) -> None:
    p = small_problem()
    for name, grad in gradients(p.replaced(top_k_index_TK=torch.full((40, 2), 4))).items():
        assert (grad == 0).all(), name


@pytest.mark.parametrize("counts", [[3, 0, 70, 1], [0, 0, 0, 0], [80, 0, 0, 0], [16, 16, 16, 32]])
def test_rows_that_come_sorted_match_the_oracle_and_their_padding_is_zero(
    counts: list[int], poisoned_memory: None
) -> None:
    rows, dtype = sum(counts), torch.float32
    p = make_problem(80, 4, top_k=1, hidden=24, width=12).rounded(dtype)
    index_M1 = torch.arange(4).repeat_interleave(torch.tensor(counts))[:, None]
    q = Problem(
        x_TD=p.x_TD[:rows],
        w13_EGD=p.w13_EGD,
        w2_EDF=p.w2_EDF,
        top_k_index_TK=index_M1,
        top_k_weights_TK=torch.ones(rows, 1),
        grad_out_TD=p.grad_out_TD[:rows],
    )
    exact = q.run(experts_reference, torch.float64)

    def padded(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_full((80 - rows, tensor.shape[1]), float("nan"))]).to(DEVICE)

    got = gradients(
        p,
        x_TD=padded(q.x_TD),
        grad_out_TD=padded(q.grad_out_TD),
        top_k_weights_TK=None,
        routing=Routing(top_k=1, offset_E1=torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()),
        hidden_MG=padded((p.w13_EGD[index_M1[:, 0]] @ q.x_TD.unsqueeze(2)).squeeze(2)),
    )
    assert got.keys() == {"dx", "dw13", "dw2"}
    assert (got["dx"][rows:] == 0).all()
    for name, grad in got.items():
        assert relative_error(grad[: len(exact[name])], exact[name]) < 1e-6, name


def test_equal_inputs_give_equal_bits() -> None:
    p = make_problem(40, 6, top_k=3, hidden=48, width=24).rounded(torch.float16)
    assert_equal_bits(gradients(p), gradients(p))


def test_relabelled_experts_give_the_relabelled_gradients() -> None:
    p = make_problem(40, 6, top_k=3, hidden=48, width=24).rounded(torch.float32)
    label_E = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    order_E = label_E.argsort()
    got = gradients(
        p.replaced(w13_EGD=p.w13_EGD[order_E], w2_EDF=p.w2_EDF[order_E], top_k_index_TK=label_E[p.top_k_index_TK])
    )
    expected = gradients(p)
    for name in ("dw13", "dw2"):
        expected[name] = expected[name][order_E]
    assert_equal_bits(got, expected)


def test_permuted_tokens_give_the_permuted_gradients() -> None:
    p = make_problem(40, 6, top_k=3, hidden=48, width=24).rounded(torch.float32)
    order_T = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    names = ("x_TD", "grad_out_TD", "top_k_index_TK", "top_k_weights_TK")
    got, expected = gradients(p.replaced(**{name: getattr(p, name)[order_T] for name in names})), gradients(p)
    for name in ("dx", "dweights"):
        expected[name] = expected[name][order_T]
    for name, grad in got.items():
        assert relative_error(grad, expected[name]) < 1e-6, name
