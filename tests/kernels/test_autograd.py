"""The experts layer on its CPU paths: gradients, dtypes, strides, compilation, and what is kept for backward."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path as Folder

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_properties import (
    PROPERTIES,
    Subject,
    rows_that_come_sorted_are_computed_and_padding_is_zero_both_ways,
)
from moe_kernels.autograd import Path, experts_backward, experts_forward
from moe_kernels.experts import experts_layer, experts_sorted
from problems import INPUTS, NAMES, Spread, assert_layer_accurate, make_problem, poisoned_memory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PATHS: tuple[Path, ...] = ("sorted", "dense")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
both_paths = pytest.mark.parametrize("path", PATHS)


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    with poisoned_memory():
        yield


@both_paths
@pytest.mark.parametrize("property_of_the_layer", PROPERTIES, ids=lambda check: check.__name__)
def test_a_cpu_path_keeps_what_the_layer_promises(property_of_the_layer: Callable, path: Path) -> None:
    property_of_the_layer(Subject(path=path, dtype=torch.float64))


@both_paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 9),
    hidden=st.integers(1, 40),
    width=st.integers(1, 30),
    spread=st.sampled_from(["uniform", "one expert", "first half"]),
)
def test_output_and_gradients_are_as_accurate_as_plain_torch_on_ragged_shapes(
    path: Path, dtype: torch.dtype, tokens: int, experts: int, top_k: int, hidden: int, width: int, spread: Spread
) -> None:
    problem = make_problem(
        tokens, experts, top_k=min(top_k, experts), hidden=hidden, width=width, spread=spread, seed=tokens
    )
    # A handful of numbers may cancel, or be exact in one order by luck; a wrong index is an error of order one.
    assert_layer_accurate(problem, partial(experts_layer, path=path), dtype, slack=4, device="cpu")


@both_paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 96, 32, 72, 12), (96, 8, 2, 64, 88), (1, 4, 4, 17, 5), (50, 6, 1, 33, 16), (5, 32, 2, 24, 8)]
)
def test_output_and_gradients_are_as_accurate_as_plain_torch_on_model_shapes(
    path: Path, dtype: torch.dtype, shape: tuple[int, int, int, int, int]
) -> None:
    tokens, experts, top_k, hidden, width = shape
    problem = make_problem(tokens, experts, top_k=top_k, hidden=hidden, width=width)
    assert_layer_accurate(problem, partial(experts_layer, path=path), dtype, slack=0.5, device="cpu")


@both_paths
def test_gradients_agree_with_finite_differences(path: Path) -> None:
    p = make_problem(5, 4, top_k=2, hidden=6, width=3)
    leaves = [getattr(p, name).requires_grad_() for name in INPUTS]

    def layer(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor) -> Tensor:
        return experts_layer(x, w13, w2, p.top_k_index_TK, weights, path=path)

    assert torch.autograd.gradcheck(layer, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=6), padding=st.integers(0, 5))
def test_rows_that_come_sorted_are_computed_and_padding_is_zero_both_ways(
    dtype: torch.dtype, counts: list[int], padding: int
) -> None:
    rows_that_come_sorted_are_computed_and_padding_is_zero_both_ways(
        Subject(path="sorted", dtype=dtype), counts=counts, padding=padding
    )


@both_paths
def test_inference_keeps_nothing_and_gives_the_bits_of_training(path: Path) -> None:
    p = make_problem(20, 4, top_k=2, hidden=16, width=8)
    tensors = p.x_TD, p.w13_EGD, p.w2_EDF, p.top_k_index_TK, p.top_k_weights_TK
    trained = p.run(partial(experts_layer, path=path), torch.float64)["out"]
    assert torch.equal(experts_layer(*tensors, path=path), trained)
    _, *kept = experts_forward(p.x_TD, p.w13_EGD, None, p.w2_EDF, *tensors[3:], None, path, False)
    assert sum(tensor.numel() for tensor in kept) == 0
    x = p.x_TD.requires_grad_()
    for without_gradients in (torch.no_grad(), torch.inference_mode()):
        with without_gradients:
            assert torch.equal(experts_layer(x, *tensors[1:], path=path), trained)
    out, *_ = experts_forward(x, p.w13_EGD, None, p.w2_EDF, *tensors[3:], None, path, False)
    with pytest.raises(RuntimeError, match="keep=False"):
        out.sum().backward()


class Dispatched(TorchDispatchMode):
    """The operators that run while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


@both_paths
def test_a_backward_is_one_operator_and_fills_no_gradient_for_what_it_kept(path: Path) -> None:
    p = make_problem(20, 4, top_k=2, hidden=16, width=8)
    leaves = [getattr(p, name).requires_grad_() for name in INPUTS]
    out = experts_layer(*leaves[:3], p.top_k_index_TK, leaves[3], path=path)
    with Dispatched() as dispatched:
        torch.autograd.grad(out, leaves, p.grad_out_TD)
    assert dispatched.operators == ["moe_kernels.experts_backward.default"]


def operands(path: Path) -> tuple[object, ...]:
    p = make_problem(12, 4, top_k=2, hidden=16, width=8).rounded(torch.float32)
    return p.x_TD, p.w13_EGD, None, p.w2_EDF, p.top_k_index_TK, p.top_k_weights_TK, None, path, True


@both_paths
def test_the_forward_operator_computes_in_the_dtype_of_the_tokens_whatever_autocast_says(path: Path) -> None:
    expected = experts_forward(*operands(path))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, experts_forward(*operands(path)), expected))


@both_paths
def test_the_forward_operator_is_what_its_schema_and_fake_say(path: Path) -> None:
    args = [t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in operands(path)]
    torch.library.opcheck(experts_forward, args)


def test_the_forward_operator_on_sorted_rows_is_what_its_schema_and_fake_say() -> None:
    x, w13, _, w2, *_ = operands("sorted")
    gate, up = w13.chunk(2, dim=1)  # type: ignore[attr-defined]
    offset = torch.tensor([0, 3, 3, 8, 12], dtype=torch.int32)
    leaves = [t.contiguous().requires_grad_() for t in (x, gate, up, w2)]  # type: ignore[attr-defined]
    torch.library.opcheck(experts_forward, (*leaves, None, None, offset, "sorted", True))


@both_paths
@pytest.mark.parametrize("needs", [(True, True, True, True), (False, True, False, False)])
def test_the_backward_operator_is_what_its_schema_and_fake_say(path: Path, needs: tuple[bool, ...]) -> None:
    x, w13, _, w2, index, weights, *_ = args = operands(path)
    out, hidden, *routing = experts_forward(*args)
    saved = (index, weights, None, None, None) if path == "dense" else (None, weights, *routing)
    torch.library.opcheck(experts_backward, (torch.randn_like(out), x, w13, None, w2, hidden, *saved, path, *needs))


@both_paths
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_compiled_layer_gives_the_bits_of_the_eager_one_for_any_number_of_tokens(path: Path, autocast: bool) -> None:
    def layer(x_TD: Tensor, *rest: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return experts_layer(2 * x_TD, *rest, path=path)

    traced = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        traced.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (26, 33, 40):
        p = make_problem(tokens, 6, top_k=3, hidden=24, width=8)
        eager, got = p.run(layer, torch.float32), p.run(compiled, torch.float32)
        assert all(torch.equal(got[name], eager[name]) for name in NAMES)
    assert len(traced) == 1


def test_sorted_rows_compile_to_one_graph_with_the_bits_of_the_eager_layer() -> None:
    def layer(x: Tensor, w13: Tensor, w2: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        counts_E = torch.zeros(4, dtype=torch.int64).scatter_add(0, index[:, 0], torch.ones_like(index[:, 0]))
        return experts_sorted(weights.sum(1, keepdim=True) * x, w13, w2, counts_E)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (26, 13):
        p = make_problem(tokens, 4, top_k=2, hidden=24, width=8)
        eager, got = p.run(layer, torch.float32), p.run(compiled, torch.float32)
        assert all(torch.equal(got[name], eager[name]) for name in NAMES)


def test_inductor_compiles_the_layer_between_operators_whose_buffers_are_its_own(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products stand around the layer, because inductor needs no C++ compiler for them."""
    turn_DD = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q

    def turned(x_TD: Tensor, *rest: Tensor) -> Tensor:
        return experts_layer(x_TD @ turn_DD, *rest) @ turn_DD

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    p = make_problem(16, 4, top_k=2, hidden=16, width=8)
    eager, got = (p.run(layer, torch.float32) for layer in (turned, torch.compile(turned, fullgraph=True)))
    for name in NAMES:
        torch.testing.assert_close(got[name], eager[name], msg=name)
