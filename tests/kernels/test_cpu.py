from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels import choose_regime, experts_reference, experts_torch
from problems import NAMES, Problem, Spread, assert_as_accurate_as_torch, make_problem, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

REGIMES = ("sorted", "dense")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
both_regimes = pytest.mark.parametrize("regime", REGIMES)


def assert_accurate(problem: Problem, regime: str, dtype: torch.dtype, *, slack: float) -> None:
    """``slack`` in units of the dtype's eps; in fp64 plain torch is the yardstick itself, hence 32 times that."""
    p = problem.rounded(dtype)
    assert_as_accurate_as_torch(
        p.run(partial(experts_torch, regime=regime), dtype),
        plain=p.run(experts_reference, dtype),
        exact=p.run(experts_reference, torch.float64),
        slack=torch.finfo(dtype).eps * slack * (32 if dtype is torch.float64 else 1),
    )


@both_regimes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 9),
    hidden=st.integers(1, 40),
    width=st.integers(1, 30),
    spread=st.sampled_from(["uniform", "one expert", "first half"]),
)
def test_output_and_gradients_are_as_accurate_as_plain_torch_on_ragged_shapes(
    regime: str, dtype: torch.dtype, tokens: int, experts: int, top_k: int, hidden: int, width: int, spread: Spread
) -> None:
    problem = make_problem(
        tokens, experts, top_k=min(top_k, experts), hidden=hidden, width=width, spread=spread, seed=tokens
    )
    # A handful of numbers may cancel, or be exact in one order by luck; a wrong index is an error of order one.
    assert_accurate(problem, regime, dtype, slack=4)


@both_regimes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 96, 32, 72, 12), (64, 48, 16, 72, 24), (96, 8, 2, 64, 88), (1, 4, 4, 17, 5), (50, 6, 1, 33, 16)]
)
def test_output_and_gradients_are_as_accurate_as_plain_torch_on_model_shapes(
    regime: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]
) -> None:
    tokens, experts, top_k, hidden, width = shape
    assert_accurate(make_problem(tokens, experts, top_k=top_k, hidden=hidden, width=width), regime, dtype, slack=0.5)


@both_regimes
def test_gradients_agree_with_finite_differences(regime: str) -> None:
    p = make_problem(5, 4, top_k=2, hidden=6, width=3)
    leaves = [t.requires_grad_() for t in (p.x_TD, p.w13_EGD, p.w2_EDF, p.top_k_weights_TK)]

    def layer(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor) -> Tensor:
        return experts_torch(x, w13, w2, p.top_k_index_TK, weights, regime=regime)

    assert torch.autograd.gradcheck(layer, leaves)


@both_regimes
def test_an_expert_named_twice_by_one_token_counts_twice(regime: str) -> None:
    p = make_problem(6, 3, top_k=2, hidden=8, width=4)
    p.top_k_index_TK[:, 1] = p.top_k_index_TK[:, 0]
    assert_accurate(p, regime, torch.float64, slack=0.5)


@both_regimes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_inputs_give_equal_bits(regime: str, dtype: torch.dtype) -> None:
    p = make_problem(200, 12, top_k=5, hidden=72, width=24)
    first, second = (p.run(partial(experts_torch, regime=regime), dtype) for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


@both_regimes
def test_relabelling_the_experts_changes_nothing_but_the_order_of_their_gradients(regime: str) -> None:
    p = make_problem(40, 6, top_k=3, hidden=24, width=8)
    old_E = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    index_TK = old_E.argsort()[p.top_k_index_TK]
    relabelled = Problem(
        **vars(p) | {"w13_EGD": p.w13_EGD[old_E], "w2_EDF": p.w2_EDF[old_E], "top_k_index_TK": index_TK}
    )
    layer = partial(experts_torch, regime=regime)
    before, after = p.run(layer, torch.float64), relabelled.run(layer, torch.float64)
    for name in NAMES:
        expected = before[name][old_E] if name in ("dw13", "dw2") else before[name]
        torch.testing.assert_close(after[name], expected, msg=name)


@both_regimes
def test_permuting_the_tokens_permutes_the_output_and_leaves_the_weight_gradients(regime: str) -> None:
    p = make_problem(40, 6, top_k=3, hidden=24, width=8)
    order_T = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    rows = ("x_TD", "top_k_index_TK", "top_k_weights_TK", "grad_out_TD")
    permuted = Problem(**vars(p) | {name: getattr(p, name)[order_T] for name in rows})
    layer = partial(experts_torch, regime=regime)
    before, after = p.run(layer, torch.float64), permuted.run(layer, torch.float64)
    for name in NAMES:
        expected = before[name] if name in ("dw13", "dw2") else before[name][order_T]
        torch.testing.assert_close(after[name], expected, msg=name)


@both_regimes
def test_an_expert_without_tokens_gets_zero_gradients_not_none(regime: str) -> None:
    p = make_problem(20, 8, top_k=2, hidden=16, width=8, spread="first half")
    got = p.run(partial(experts_torch, regime=regime), torch.float32)
    assert (got["dw13"][4:] == 0).all()
    assert (got["dw2"][4:] == 0).all()
    assert (got["dw13"][:4] != 0).any(-1).all()


@both_regimes
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_backward_keeps_the_parameters_and_no_view_or_copy_of_a_weight(regime: str, autocast: bool) -> None:
    p = make_problem(20, 4, top_k=2, hidden=16, width=8)
    w13, w2 = torch.nn.Parameter(p.w13_EGD.float()), torch.nn.Parameter(p.w2_EDF.float())
    with torch.autocast("cpu", enabled=autocast):
        out = experts_torch(p.x_TD.float(), w13, w2, p.top_k_index_TK, p.top_k_weights_TK.float(), regime=regime)
    saved = out.grad_fn.saved_tensors
    for weight in (w13, w2):
        same = [t for t in saved if t.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()]
        assert [(t.data_ptr(), t.shape, t._base, t.is_leaf) for t in same] == [
            (weight.data_ptr(), weight.shape, None, True)
        ]
        others = [t for t in saved if t is not same[0]]
        assert not any(t.shape == weight.shape or t.numel() == weight.numel() for t in others)


@both_regimes
def test_under_autocast_the_gemms_run_in_bf16_and_the_gradients_keep_the_dtype_of_the_parameters(regime: str) -> None:
    p = make_problem(64, 6, top_k=2, hidden=48, width=24).rounded(torch.float32)

    def under_autocast(layer: object) -> dict[str, Tensor]:
        def run(*args: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return layer(*args)  # type: ignore[operator, no-any-return]

        return p.run(run, torch.float32)

    got = under_autocast(partial(experts_torch, regime=regime))
    assert all(tensor.dtype is torch.float32 for tensor in got.values())
    exact = p.run(experts_reference, torch.float64)
    assert relative_error(got["out"], exact["out"]) > 1e-3, "the GEMMs did not run in bf16"
    slack = torch.finfo(torch.bfloat16).eps / 2
    assert_as_accurate_as_torch(got, plain=under_autocast(experts_reference), exact=exact, slack=slack)


@both_regimes
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(regime: str, reentrant: bool) -> None:
    p = make_problem(30, 6, top_k=3, hidden=24, width=8)
    layer = partial(experts_torch, regime=regime)
    plain = p.run(layer, torch.float32)

    def checkpointed(*args: Tensor) -> Tensor:
        return checkpoint(layer, *args, use_reentrant=reentrant)  # type: ignore[no-any-return]

    if reentrant:  # re-entrant checkpointing supports .backward() only
        leaves = [t.float().requires_grad_() for t in (p.x_TD, p.w13_EGD, p.w2_EDF, p.top_k_weights_TK)]
        checkpointed(*leaves[:3], p.top_k_index_TK, leaves[3]).backward(p.grad_out_TD.float())
        again = dict(zip(NAMES[1:], [leaf.grad for leaf in leaves], strict=True))
    else:
        again = p.run(checkpointed, torch.float32)
    for name, tensor in again.items():
        assert torch.equal(tensor, plain[name]), name


@both_regimes
@pytest.mark.parametrize("wanted", NAMES[1:])
def test_only_the_gradients_that_are_needed_are_computed(regime: str, wanted: str) -> None:
    p = make_problem(20, 4, top_k=2, hidden=16, width=8)
    leaves = dict(zip(NAMES[1:], (p.x_TD, p.w13_EGD, p.w2_EDF, p.top_k_weights_TK), strict=True))
    leaves[wanted].requires_grad_()
    x, w13, w2, weights = leaves.values()
    out = experts_torch(x, w13, w2, p.top_k_index_TK, weights, regime=regime)
    out.backward(p.grad_out_TD)
    expected = p.run(experts_reference, torch.float64)[wanted]
    torch.testing.assert_close(leaves[wanted].grad, expected)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


@both_regimes
def test_tokens_and_upstream_gradients_may_have_any_strides(regime: str) -> None:
    p = make_problem(20, 4, top_k=2, hidden=16, width=8)
    layer = partial(experts_torch, regime=regime)
    strided = Problem(**vars(p) | {"grad_out_TD": p.grad_out_TD.t().contiguous().t()})

    def through_a_view(x_TD: Tensor, *rest: Tensor) -> Tensor:
        return layer(x_TD.t().contiguous().t(), *rest)

    before, after = p.run(layer, torch.float64), strided.run(through_a_view, torch.float64)
    for name in NAMES:
        torch.testing.assert_close(after[name], before[name], msg=name)


@both_regimes
def test_an_index_outside_the_experts_is_refused(regime: str) -> None:
    p = make_problem(8, 4, top_k=2, hidden=16, width=8)
    for bad in (-1, 4):
        p.top_k_index_TK[3, 1] = bad
        with pytest.raises((IndexError, RuntimeError), match="index"):
            experts_torch(p.x_TD, p.w13_EGD, p.w2_EDF, p.top_k_index_TK, p.top_k_weights_TK, regime=regime)


def test_a_wrong_shape_is_named() -> None:
    p = make_problem(8, 4, top_k=2, hidden=16, width=8)
    with pytest.raises(ValueError, match=r"w2 has shape \(4, 8, 16\), expected \(4, 16, 8\)"):
        experts_torch(p.x_TD, p.w13_EGD, p.w2_EDF.transpose(1, 2), p.top_k_index_TK, p.top_k_weights_TK)


@pytest.mark.parametrize(
    ("shape", "dtype", "regime"),
    [
        ((96, 32, 12), torch.bfloat16, "dense"),
        ((48, 16, 24), torch.bfloat16, "dense"),
        ((48, 16, 24), torch.float32, "sorted"),
        ((16, 4, 344), torch.bfloat16, "sorted"),
        ((8, 2, 704), torch.float32, "sorted"),
        ((8, 8, 704), torch.float32, "dense"),
    ],
)
def test_narrow_experts_are_computed_densely_and_wide_ones_sorted(
    shape: tuple[int, int, int], dtype: torch.dtype, regime: str
) -> None:
    experts, top_k, width = shape
    assert choose_regime(experts, top_k, width=width, tokens=1024, dtype=dtype) == regime


def test_a_single_decoded_token_never_computes_all_experts() -> None:
    assert choose_regime(96, 32, width=12, tokens=1, dtype=torch.bfloat16) == "sorted"
