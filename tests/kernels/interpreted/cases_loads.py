"""Weights by pointer or descriptor, fused or separate, cast or not give the Triton kernels the same bits.

Run by ``test_interpreted.py``.
"""

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from moe_kernels import backward, experts_reference, forward
from moe_kernels.backward import experts_backward_triton
from moe_kernels.config import Tile
from moe_kernels.routing import build_routing
from problems import Problem, make_problem, poisoned_memory, relative_error
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2, group_m=2)
NEEDS = {"need_x": True, "need_w13": True, "need_w2": True, "need_weights": True}


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    with poisoned_memory():
        yield


def run(p: Problem, *, w3: Tensor | None = None, only_forward: bool = False, **changes: Tensor) -> dict[str, Tensor]:
    """The output, the pre-activations of present experts and the gradients, by name, with some tensors changed."""
    t = {name: tensor.to(DEVICE) for name, tensor in vars(p).items()} | changes
    x, w13, w2, weights = t["x_TD"], t["w13_EGD"], t["w2_EDF"], t["top_k_weights_TK"]
    shared: dict[str, Any] = {
        "weights_TK": weights,
        "routing": build_routing(t["top_k_index_TK"], experts=w2.shape[0]),
    }
    out, hidden = forward.experts_forward_triton(x, w13, w3, w2, **shared, keep_hidden=True)
    results = {"out": out, "hidden": hidden[: int(shared["routing"].offset_E1[-1])]}
    if only_forward:
        return results
    dx, dw13, dw3, dw2, dweights = experts_backward_triton(t["grad_out_TD"], x, w13, w3, w2, hidden, **shared, **NEEDS)
    dw13 = dw13 if dw3 is None else torch.cat([dw13, dw3], dim=1)
    return results | {"dx": dx, "dw13": dw13, "dw2": dw2, "dweights": dweights}


def assert_equal_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


def projections(p: Problem, *, dtype: torch.dtype | None = None, up_first: bool = False) -> dict[str, Tensor]:
    """Gate and up as separate contiguous tensors, one behind the other in memory."""
    both = p.w13_EGD.to(DEVICE, dtype).unflatten(1, (2, -1)).transpose(0, 1)
    both = (both.flip(0) if up_first else both).contiguous()
    return {"w13_EGD": both[int(up_first)], "w3": both[int(not up_first)]}


@pytest.mark.parametrize("up_first", [False, True])
def test_separate_gate_and_up_weights_give_the_bits_of_fused_ones(up_first: bool) -> None:
    p = make_problem(20, 3, top_k=2, hidden=33, width=21).rounded(torch.float32)
    assert_equal_bits(run(p, **projections(p, up_first=up_first)), run(p))


def test_fp32_weights_give_the_bits_of_weights_cast_before_and_get_gradients_straight_from_the_sums() -> None:
    p = make_problem(20, 3, top_k=2, hidden=33, width=21).rounded(torch.float16)
    names = ("w13_EGD", "w2_EDF", "top_k_weights_TK")
    half, whole = run(p), run(p, **{name: getattr(p, name).float().to(DEVICE) for name in names})
    assert {name for name, tensor in whole.items() if tensor.dtype == torch.float32} == {"dw13", "dw2", "dweights"}
    assert not torch.equal(whole["dw2"], half["dw2"].float())
    assert_equal_bits({name: tensor.half() for name, tensor in whole.items()}, half)


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The interpreter poses as a Hopper; collects whether each forward GEMM loaded by tensor descriptors."""
    chosen, choose = [], forward.loads_by_descriptor

    def record(*args: Any, **kwargs: Any) -> bool:
        chosen.append(choose(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(forward, "tile", lambda kernel, **_: SMALL)
    monkeypatch.setattr(forward, "current_arch", lambda: 90)
    monkeypatch.setattr(forward, "loads_by_descriptor", record)
    return chosen


@pytest.mark.parametrize(
    ("shape", "dtype", "separate", "persistent", "expected"),
    [
        ((40, 4, 2, 40, 24), torch.float16, None, False, [True, True]),
        ((40, 4, 2, 40, 24), torch.float16, None, True, [True, True]),
        ((40, 4, 2, 40, 24), torch.bfloat16, torch.float32, True, [True, True]),  # cast, and so copied side by side
        ((40, 4, 2, 40, 24), torch.bfloat16, torch.bfloat16, True, [True]),  # read in place by pointer: down's alone
        ((1, 3, 3, 16, 8), torch.float16, None, True, [True, True]),
        ((6, 9, 1, 72, 16), torch.float16, None, True, [True, True]),
    ],
    ids=str,
)
def test_forward_loads_by_descriptor_give_the_bits_of_loads_by_pointer(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    separate: torch.dtype | None,
    persistent: bool,
    expected: list[bool],
    descriptors: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward, "LARGE_TILE", 0 if persistent else 2**30)
    tokens, experts, top_k, hidden, width = shape
    p = make_problem(tokens, experts, top_k=top_k, hidden=hidden, width=width).rounded(dtype)
    weights = projections(p, dtype=separate) if separate else {}
    absent = {"top_k_index_TK": (p.top_k_index_TK + 1).to(DEVICE)}  # expert E among them
    by_descriptor = run(p, only_forward=True, **weights, **absent)
    assert descriptors == expected
    monkeypatch.setattr(forward, "loads_by_descriptor", lambda *args, **kwargs: False)
    assert_equal_bits(run(p, only_forward=True, **weights, **absent), by_descriptor)


def test_backward_loads_by_descriptor_give_the_bits_of_loads_by_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_problem(20, 2, top_k=2, hidden=40, width=72).rounded(torch.float16)
    by_pointers = run(p)
    descriptors = Mock(wraps=forward.TensorDescriptor)
    monkeypatch.setattr(forward, "current_arch", lambda: 90)
    for module in (forward, backward):
        monkeypatch.setattr(module, "TensorDescriptor", descriptors)
    assert_equal_bits(run(p), by_pointers)
    assert len(descriptors.mock_calls) == 6  # forward: w13, act, w2; backward: w2, grad_hidden, w13


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
    weights = projections(p, up_first=True) if "up first" in changes else {}
    if "odd address" in changes:
        buffer = torch.empty(p.w13_EGD.numel() + 1, dtype=dtype, device=DEVICE)
        weights = {"w13_EGD": buffer[1:].view(p.w13_EGD.shape).copy_(p.w13_EGD)}
    out = run(p, only_forward=True, **weights)["out"]
    assert descriptors == expected
    q = p.rounded(torch.float64)
    exact = experts_reference(q.x_TD, q.w13_EGD, q.w2_EDF, q.top_k_index_TK, q.top_k_weights_TK)
    assert relative_error(out.cpu(), exact) < 4 * torch.finfo(dtype).eps
