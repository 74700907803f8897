"""The Triton forward against fp64: every output, every edge. Run by ``test_interpreted.py``."""

from typing import Any

import pytest
import torch
from forward_problems import DEVICE, INTERPRETED, SMALL, run
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels import experts_reference, forward
from moe_kernels.config import Tile
from moe_kernels.routing import Routing
from problems import Problem, Spread, assert_as_accurate_as_torch, make_problem, relative_error
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (T, E, K, D, F)
SHAPES: list[tuple[tuple[int, int, int, int, int], Spread]] = [
    ((64, 8, 2, 64, 48), "uniform"),
    ((33, 12, 4, 40, 12), "uniform"),
    ((70, 4, 2, 97, 47), "uniform"),
    ((1, 4, 4, 17, 5), "uniform"),
    ((40, 6, 1, 32, 16), "first half"),
    ((9, 3, 3, 16, 1), "uniform"),
    ((6, 1, 1, 1, 8), "uniform"),
    ((5, 32, 2, 24, 8), "uniform"),
    ((150, 3, 1, 33, 20), "one expert"),
    ((0, 4, 2, 16, 8), "uniform"),
]


def torch_layer(p: Problem, dtype: torch.dtype, *, flat_M: Tensor) -> dict[str, Tensor]:
    """The output of the oracle in ``dtype``, and its pre-activations in the order of ``flat_M``."""
    q = p.rounded(dtype)
    out = experts_reference(q.x_TD, q.w13_EGD, q.w2_EDF, q.top_k_index_TK, q.top_k_weights_TK)
    token_M = flat_M.long() // q.top_k_index_TK.shape[1]
    w13_MGD = q.w13_EGD[q.top_k_index_TK.reshape(-1)[flat_M.long()]]
    return {"out": out, "hidden": (w13_MGD @ q.x_TD[token_M].unsqueeze(2)).squeeze(2)}


def assert_accurate(p: Problem, dtype: torch.dtype, *, experts: int) -> None:
    p = p.rounded(dtype)
    out, hidden, routing = run(p, experts=experts)
    assert routing.flat_M is not None
    flat_M = routing.flat_M.cpu()
    # The interpreter truncates fp32 -> bf16 where a GPU rounds to nearest: one more unit in the last place.
    slack = torch.finfo(dtype).eps * (1 if dtype is torch.bfloat16 and INTERPRETED else 0.5)
    assert out.dtype == hidden.dtype == dtype
    assert_as_accurate_as_torch(
        {"out": out.cpu(), "hidden": hidden.cpu()},
        plain=torch_layer(p, dtype, flat_M=flat_M),
        exact=torch_layer(p, torch.float64, flat_M=flat_M),
        slack=slack,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "spread"), SHAPES)
def test_output_and_hidden_are_as_accurate_as_plain_torch(
    shape: tuple[int, int, int, int, int], spread: Spread, dtype: torch.dtype, poisoned_memory: None
) -> None:
    tokens, experts, top_k, hidden, width = shape
    p = make_problem(tokens, experts, top_k=top_k, hidden=hidden, width=width, spread=spread)
    assert_accurate(p, dtype, experts=experts)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    hidden=st.integers(1, 70),
    width=st.integers(1, 40),
)
def test_output_and_hidden_are_as_accurate_as_plain_torch_on_ragged_shapes(
    tokens: int, experts: int, top_k: int, hidden: int, width: int
) -> None:
    p = make_problem(tokens, experts, top_k=min(top_k, experts), hidden=hidden, width=width)
    assert_accurate(p, torch.float32, experts=experts)


@pytest.mark.parametrize("group_m", [1, 3, 8])
@pytest.mark.parametrize("blocks", [(16, 32, 16), (64, 16, 32), (128, 64, 64)])
def test_every_tile_computes_the_same(
    blocks: tuple[int, int, int], group_m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_m, block_n, block_k = blocks
    shape = Tile(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=4, num_stages=2, group_m=group_m)
    monkeypatch.setattr(forward, "tile", lambda kernel, **_: shape)
    assert_accurate(make_problem(60, 3, top_k=2, hidden=40, width=50), torch.float32, experts=3)


def test_without_a_backward_nothing_is_kept_and_the_output_is_the_same() -> None:
    p = make_problem(40, 4, top_k=2, hidden=32, width=16).rounded(torch.float16)
    out, hidden, _ = run(p, experts=4, keep_hidden=False)
    assert hidden.numel() == 0
    assert torch.equal(out, run(p, experts=4)[0])


def test_separate_gate_and_up_weights_give_the_bits_of_fused_ones() -> None:
    p = make_problem(40, 4, top_k=2, hidden=33, width=17).rounded(torch.float32)
    gate, up = p.w13_EGD.to(DEVICE).chunk(2, dim=1)
    gate_after_up = torch.cat([up, gate])
    for w13, w3 in ((gate, up), (gate.contiguous(), up.contiguous()), (gate_after_up[4:], gate_after_up[:4])):
        out, hidden, _ = run(p, experts=4, w13_EGD=w13, w3=w3)
        assert torch.equal(out, run(p, experts=4)[0])
        assert torch.equal(hidden, run(p, experts=4)[1])


def test_master_weights_give_the_bits_of_weights_cast_before() -> None:
    p = make_problem(40, 4, top_k=2, hidden=32, width=16).rounded(torch.float16)
    masters = {"w13_EGD": p.w13_EGD.float().to(DEVICE), "w2_EDF": p.w2_EDF.float().to(DEVICE)}
    assert torch.equal(run(p, experts=4, **masters)[0], run(p, experts=4)[0])


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The interpreter passes for a Hopper; collects whether each GEMM loaded by tensor descriptors."""
    chosen, choose = [], forward.loads_by_descriptor

    def record(*args: Any, **kwargs: Any) -> bool:
        chosen.append(choose(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(forward, "tile", lambda kernel, **_: SMALL)
    monkeypatch.setattr(forward, "current_arch", lambda: 90)
    monkeypatch.setattr(forward, "loads_by_descriptor", record)
    return chosen


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    ("dtype", "separate", "expected"),
    [
        (torch.float16, None, [True, True]),
        (torch.bfloat16, torch.float32, [True, True]),  # cast, and so copied side by side
        (torch.bfloat16, torch.bfloat16, [True]),  # read where they lie, by pointer: the other is down's
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(40, 4, 2, 40, 24), (1, 3, 3, 16, 8), (6, 9, 1, 72, 16)])
def test_loads_by_descriptor_give_the_bits_of_loads_by_pointer(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    separate: torch.dtype | None,
    expected: list[bool],
    persistent: bool,
    descriptors: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    poisoned_memory: None,
) -> None:
    monkeypatch.setattr(forward, "LARGE_TILE", 0 if persistent else 2**30)
    tokens, experts, top_k, hidden, width = shape
    p = make_problem(tokens, experts, top_k=top_k, hidden=hidden, width=width).rounded(dtype)
    both = p.w13_EGD.to(DEVICE).unflatten(1, (2, width)).transpose(0, 1).contiguous()
    weights = {"w13_EGD": both[0].to(separate), "w3": both[1].to(separate)} if separate else {}
    absent = {"top_k_index_TK": (p.top_k_index_TK + 1).to(DEVICE)}  # expert E among them
    out, kept, routing = run(p, experts=experts, **weights, **absent)
    assert descriptors == expected
    monkeypatch.setattr(forward, "loads_by_descriptor", lambda *args, **kwargs: False)
    by_pointer = run(p, experts=experts, **weights, **absent)
    here = int(routing.offset_E1[-1])
    assert torch.equal(out, by_pointer[0])
    assert torch.equal(kept[:here], by_pointer[1][:here])


@pytest.mark.parametrize(
    ("shape", "changes", "expected"),
    [
        ((9, 2, 1, 16, 12), {}, [True, False]),  # rows of w2 are 24 bytes apart
        ((9, 2, 1, 20, 16), {}, [False, True]),  # rows of w13 are 40 bytes apart
        ((9, 2, 1, 16, 16), {"dtype": torch.float32}, [False, False]),
        ((9, 2, 1, 16, 16), {"up first": True}, [True]),
        ((9, 2, 1, 16, 16), {"odd address": True}, [False, True]),
    ],
)
def test_weights_that_no_descriptor_can_describe_are_loaded_by_pointer(
    shape: tuple[int, int, int, int, int], changes: dict[str, Any], expected: list[bool], descriptors: list[bool]
) -> None:
    tokens, experts, top_k, hidden, width = shape
    dtype = changes.get("dtype", torch.float16)
    p = make_problem(tokens, experts, top_k=top_k, hidden=hidden, width=width).rounded(dtype)
    weights = {}
    if "up first" in changes:
        both = p.w13_EGD.to(DEVICE).unflatten(1, (2, width)).transpose(0, 1).flip(0).contiguous()
        weights = {"w13_EGD": both[1], "w3": both[0]}
    if "odd address" in changes:
        buffer = torch.empty(p.w13_EGD.numel() + 1, dtype=dtype, device=DEVICE)
        weights = {"w13_EGD": buffer[1:].view(p.w13_EGD.shape).copy_(p.w13_EGD)}
    out, _, _ = run(p, experts=experts, **weights)
    assert descriptors == expected
    q = p.rounded(torch.float64)
    exact = experts_reference(q.x_TD, q.w13_EGD, q.w2_EDF, q.top_k_index_TK, q.top_k_weights_TK)
    assert relative_error(out.cpu(), exact) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "one row for all"])
def test_strided_tokens_give_the_bits_of_contiguous_ones(layout: str) -> None:
    p = make_problem(24, 4, top_k=2, hidden=32, width=16).rounded(torch.float32)
    x_TD = p.x_TD.to(DEVICE)
    if layout == "rows apart":
        strided = torch.full((24, 50), float("nan"), device=DEVICE)[:, 9:41].copy_(x_TD)
    elif layout == "transposed":
        strided = x_TD.t().contiguous().t()
    else:
        strided = x_TD[:1].expand(24, 32)
    assert torch.equal(run(p, experts=4, x_TD=strided)[0], run(p, experts=4, x_TD=strided.clone())[0])


def test_absent_experts_add_nothing_and_their_rows_are_never_read(poisoned_memory: None) -> None:
    p = make_problem(50, 8, top_k=3, hidden=40, width=20).rounded(torch.float32)
    index_TK, weights_TK = p.top_k_index_TK.clamp(max=5), p.top_k_weights_TK.clone()
    absent_TK = p.top_k_index_TK > 4
    weights_TK[absent_TK] = float("inf")
    here = {"w13_EGD": p.w13_EGD[:5].to(DEVICE), "w2_EDF": p.w2_EDF[:5].to(DEVICE)}
    routed = {"top_k_index_TK": index_TK.to(DEVICE), "top_k_weights_TK": weights_TK.to(DEVICE)}
    out, hidden, _ = run(p, experts=5, **here, **routed)
    q = p.rounded(torch.float64)
    present_TK = q.top_k_weights_TK.masked_fill(absent_TK, 0)
    exact = experts_reference(q.x_TD, q.w13_EGD, q.w2_EDF, q.top_k_index_TK, present_TK)
    assert relative_error(out.cpu(), exact) < 1e-6
    assert hidden.isnan().all(1).sum() == absent_TK.sum()


def test_with_every_expert_absent_the_output_is_zero(poisoned_memory: None) -> None:
    p = make_problem(20, 2, top_k=2, hidden=16, width=8).rounded(torch.float32)
    out, _, _ = run(p, experts=2, top_k_index_TK=torch.full((20, 2), 2, device=DEVICE))
    assert (out == 0).all()


@pytest.mark.parametrize("counts", [[3, 0, 70, 1], [0, 0, 0, 0], [80, 0, 0, 0], [16, 16, 16, 32]])
def test_rows_that_come_sorted_match_the_oracle_and_their_padding_is_zero(
    counts: list[int], poisoned_memory: None
) -> None:
    p = make_problem(80, 4, top_k=1, hidden=24, width=12).rounded(torch.float32)
    rows = sum(counts)
    x_MD = p.x_TD.to(DEVICE)
    x_MD[rows:] = float("nan")
    offset_E1 = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    out, hidden = forward.experts_forward_triton(
        x_MD,
        p.w13_EGD.to(DEVICE),
        None,
        p.w2_EDF.to(DEVICE),
        weights_TK=None,
        routing=Routing(top_k=1, offset_E1=offset_E1),
        keep_hidden=True,
    )
    q = p.rounded(torch.float64)
    index_M1 = torch.arange(4).repeat_interleave(torch.tensor(counts))[:, None]
    exact = experts_reference(q.x_TD[:rows], q.w13_EGD, q.w2_EDF, index_M1, torch.ones(rows, 1, dtype=torch.float64))
    assert relative_error(out[:rows].cpu(), exact) < 1e-6
    assert (out[rows:] == 0).all()
    assert hidden.shape == (80, 24)


def test_memory_around_the_inputs_never_reaches_the_result() -> None:
    p = make_problem(21, 3, top_k=2, hidden=19, width=11).rounded(torch.float32)

    def amid_nan(tensor: Tensor) -> Tensor:
        """A contiguous copy with NaN before and behind it."""
        buffer = torch.full((tensor.numel() + 8192,), float("nan"), device=DEVICE)
        return buffer[4096:-4096].view(tensor.shape).copy_(tensor)

    names = ("x_TD", "w13_EGD", "w2_EDF", "top_k_weights_TK")
    out, hidden, _ = run(p, experts=3, **{name: amid_nan(getattr(p, name)) for name in names})
    assert torch.equal(out, run(p, experts=3)[0])
    assert torch.equal(hidden, run(p, experts=3)[1])


def test_a_token_or_an_expert_of_nan_spoils_no_other() -> None:
    p = make_problem(40, 4, top_k=1, hidden=24, width=12).rounded(torch.float32)
    x_TD, w13_EGD = p.x_TD.to(DEVICE).clone(), p.w13_EGD.to(DEVICE).clone()
    x_TD[0] = float("nan")
    w13_EGD[2] = float("inf")
    out, _, _ = run(p, experts=4, x_TD=x_TD, w13_EGD=w13_EGD)
    spoiled = p.top_k_index_TK[:, 0] == 2
    spoiled[0] = True
    assert torch.equal(out[~spoiled.to(DEVICE)], run(p, experts=4)[0][~spoiled.to(DEVICE)])


def test_equal_inputs_give_equal_bits() -> None:
    p = make_problem(40, 6, top_k=3, hidden=48, width=24).rounded(torch.float32)
    first, second = run(p, experts=6), run(p, experts=6)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_relabelled_experts_give_the_same_output() -> None:
    p = make_problem(40, 6, top_k=3, hidden=48, width=24).rounded(torch.float32)
    label_E = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    relabelled = {
        "w13_EGD": p.w13_EGD[label_E.argsort()].to(DEVICE),
        "w2_EDF": p.w2_EDF[label_E.argsort()].to(DEVICE),
        "top_k_index_TK": label_E[p.top_k_index_TK].to(DEVICE),
    }
    assert relative_error(run(p, experts=6, **relabelled)[0], run(p, experts=6)[0]) < 1e-6


def test_permuted_tokens_give_the_permuted_output() -> None:
    p = make_problem(40, 6, top_k=3, hidden=48, width=24).rounded(torch.float32)
    order_T = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    names = ("x_TD", "top_k_index_TK", "top_k_weights_TK")
    permuted = run(p, experts=6, **{name: getattr(p, name)[order_T].to(DEVICE) for name in names})[0]
    assert relative_error(permuted, run(p, experts=6)[0][order_T.to(DEVICE)]) < 1e-6


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


# Past 2^31 elements. Memory is mapped but not touched: only a few pages of these gigabytes exist.
