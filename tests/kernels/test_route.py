from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.reference import router_gradient_reference, router_reference
from moe_kernels.router import route
from torch import Tensor

VARIANTS = (
    ("top_k_then_softmax", True),
    ("softmax_then_top_k", True),
    ("softmax_then_top_k", False),
    ("sigmoid", True),
    ("sigmoid", False),
)
every_variant = pytest.mark.parametrize(("scoring", "normalise"), VARIANTS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_and_gradient(logits_TE: Tensor, grad_TK: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    leaf_TE = logits_TE.clone().requires_grad_()
    index_TK, weights_TK = route(leaf_TE, grad_TK.shape[1], **options)
    (grad_TE,) = torch.autograd.grad(weights_TK, leaf_TE, grad_TK.to(weights_TK.dtype))
    return index_TK, weights_TK.detach(), grad_TE


@every_variant
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 40),
    biased=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 9),
)
def test_choice_weights_and_gradient_are_those_of_the_reference(
    scoring: Any, normalise: bool, tokens: int, experts: int, top_k: int, biased: bool, scale: float, seed: int
) -> None:
    top_k = min(top_k, experts)
    logits_TE, grad_TK = 2 * normal(tokens, experts, seed=seed), normal(tokens, top_k, seed=seed + 100)
    options = {"scoring": scoring, "normalise": normalise, "scale": scale}
    bias_E = normal(experts, seed=seed + 200) if biased else None
    index_TK, weights_TK, grad_TE = weights_and_gradient(logits_TE, grad_TK, bias_E=bias_E, **options)
    expected = router_reference(logits_TE, top_k, bias_E=bias_E, **options)
    torch.testing.assert_close((index_TK, weights_TK), expected)
    torch.testing.assert_close(grad_TE, router_gradient_reference(logits_TE, index_TK, grad_TK, **options))


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_lower_precision_logits_are_routed_in_fp32_and_get_a_gradient_of_their_dtype(
    scoring: Any, normalise: bool, dtype: torch.dtype, autocast: bool
) -> None:
    logits_TE, grad_TK = normal(50, 24).to(dtype), normal(50, 5, seed=1).float()
    options = {"scoring": scoring, "normalise": normalise}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        index_TK, weights_TK, grad_TE = weights_and_gradient(logits_TE, grad_TK, **options)
    assert (weights_TK.dtype, grad_TE.dtype) == (torch.float32, dtype)
    exact_index_TK, exact_TK = router_reference(logits_TE.double(), 5, **options)
    exact_TE = router_gradient_reference(logits_TE.double(), exact_index_TK, grad_TK.double(), **options)
    plain_TE = logits_TE.clone().requires_grad_()
    _, plain_TK = router_reference(plain_TE.float(), 5, **options)
    plain_TK.backward(grad_TK)
    assert torch.equal(index_TK, exact_index_TK)
    # torch's derivative of a sigmoid, s (1 - s), cancels where s is near one.
    slack = torch.finfo(torch.float32).eps * (4 if scoring == "sigmoid" else 0.5)
    for ours, plain, exact in ((weights_TK, plain_TK, exact_TK), (grad_TE, plain_TE.grad, exact_TE)):
        error, plain_error = ((result.double() - exact).norm() / exact.norm() for result in (ours, plain))
        assert error <= 1.5 * plain_error + slack


@every_variant
def test_gradients_agree_with_finite_differences(scoring: Any, normalise: bool) -> None:
    logits_TE = normal(4, 6).requires_grad_()
    bias_E = normal(6, seed=1)
    assert torch.autograd.gradcheck(
        lambda z_TE: route(z_TE, 3, scoring=scoring, normalise=normalise, bias_E=bias_E, scale=1.5)[1], logits_TE
    )


@every_variant
def test_of_equal_scores_the_lower_expert_wins(scoring: Any, normalise: bool) -> None:
    equal_TE = torch.zeros(2, 7)
    index_TK, _ = route(equal_TE, 3, scoring=scoring, normalise=normalise, bias_E=torch.zeros(7))
    assert index_TK.tolist() == [[0, 1, 2]] * 2
    coarse_TE = normal(300, 64).mul(2).round().bfloat16()
    index_TK, _ = route(coarse_TE, 8, scoring=scoring, normalise=normalise)
    for z_E, chosen_K in zip(coarse_TE.tolist(), index_TK.tolist(), strict=True):
        assert chosen_K == sorted(range(64), key=lambda expert: (-z_E[expert], expert))[:8]


def test_the_choice_tells_apart_logits_whose_scores_round_to_the_same_number() -> None:
    for scoring in ("softmax_then_top_k", "sigmoid"):
        index_TK, _ = route(torch.tensor([[-300.0, -250.0, 30.0, 40.0]]), 4, scoring=scoring)
        assert index_TK.tolist() == [[3, 2, 1, 0]]


def test_one_expert_a_token_gets_weight_one_and_no_gradient_from_a_softmax_over_the_chosen() -> None:
    _, weights_TK, grad_TE = weights_and_gradient(normal(30, 8), normal(30, 1, seed=1), scoring="top_k_then_softmax")
    assert (weights_TK == 1).all()
    assert (grad_TE == 0).all()


def test_logits_that_were_not_chosen_get_a_gradient_only_from_a_softmax_over_all_experts() -> None:
    for scoring, normalise in VARIANTS:
        index_TK, _, grad_TE = weights_and_gradient(
            normal(30, 8), normal(30, 2, seed=1), scoring=scoring, normalise=normalise
        )
        elsewhere = grad_TE.scatter(1, index_TK, 0.0) != 0
        assert int(elsewhere.sum()) == (30 * 6 if (scoring, normalise) == ("softmax_then_top_k", False) else 0)


def test_a_renormalised_softmax_over_all_is_the_softmax_over_the_chosen_in_value_and_gradient() -> None:
    logits_TE, grad_TK = normal(40, 12), normal(40, 4, seed=1)
    chosen = weights_and_gradient(logits_TE, grad_TK, scoring="top_k_then_softmax")
    torch.testing.assert_close(weights_and_gradient(logits_TE, grad_TK, scoring="softmax_then_top_k"), chosen)


@every_variant
def test_the_bias_moves_the_choice_and_nothing_else(scoring: Any, normalise: bool) -> None:
    logits_TE = normal(20, 6)
    bias_E = torch.tensor([0, 0, 0, 0, 0, 50.0]).requires_grad_()
    index_TK, weights_TK = route(
        logits_TE.requires_grad_(), 6, scoring=scoring, normalise=normalise, bias_E=bias_E, scale=3.0
    )
    assert (index_TK[:, 0] == 5).all()
    plain_index_TK, plain_TK = route(logits_TE, 6, scoring=scoring, normalise=normalise, scale=3.0)
    by_expert = torch.zeros(20, 6, dtype=torch.float64)
    torch.testing.assert_close(
        by_expert.scatter(1, index_TK, weights_TK), by_expert.scatter(1, plain_index_TK, plain_TK)
    )
    weights_TK.square().sum().backward()
    assert bias_E.grad is None
    assert not index_TK.requires_grad


def test_sigmoids_that_all_round_to_zero_do_not_become_nan() -> None:
    _, weights_TK, grad_TE = weights_and_gradient(torch.full((1, 4), -200.0), torch.ones(1, 2), scoring="sigmoid")
    assert weights_TK.isfinite().all()
    assert grad_TE.isfinite().all()


def test_a_nan_stays_with_its_token() -> None:
    logits_TE = normal(3, 5)
    logits_TE[1, 2] = float("nan")
    for scoring, normalise in VARIANTS:
        _, weights_TK = route(logits_TE, 2, scoring=scoring, normalise=normalise)
        assert weights_TK.isnan().any(-1).tolist() == [False, True, False]


@every_variant
def test_it_compiles_into_one_graph_with_equal_results(scoring: Any, normalise: bool) -> None:
    def step(z_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
        return route(z_TE, 3, scoring=scoring, normalise=normalise, bias_E=bias_E, scale=2.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (step, compiled):
        logits_TE = normal(10, 7).float().requires_grad_()
        index_TK, weights_TK = function(logits_TE, normal(7, seed=1).float())
        weights_TK.square().sum().backward()
        gradients.append((index_TK, weights_TK.detach(), logits_TE.grad))
    torch.testing.assert_close(*gradients)


def test_meta_tensors_and_batches_without_tokens_have_shapes_and_dtypes() -> None:
    for logits_TE in (torch.empty(9, 6, dtype=torch.bfloat16, device="meta"), torch.empty(0, 6)):
        for scoring, normalise in VARIANTS:
            index_TK, weights_TK = route(logits_TE, 2, scoring=scoring, normalise=normalise)
            assert index_TK.shape == weights_TK.shape == (len(logits_TE), 2)
            assert (index_TK.dtype, weights_TK.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(
    ("logits", "top_k", "options", "message"),
    [
        (torch.zeros(2, 3, 4), 1, {"scoring": "sigmoid"}, r"\(T, E\), got torch.float32 \(2, 3, 4\)"),
        (torch.zeros(2, 4, dtype=torch.long), 1, {"scoring": "sigmoid"}, r"floating numbers .* got torch.int64"),
        (torch.zeros(2, 4), 0, {"scoring": "sigmoid"}, r"top_k must lie in \[1, 4\].* got 0"),
        (torch.zeros(2, 4), 5, {"scoring": "sigmoid"}, r"top_k must lie in \[1, 4\].* got 5"),
        (
            torch.zeros(2, 4),
            1,
            {"scoring": "softmax"},
            "softmax_then_top_k, top_k_then_softmax, sigmoid, got 'softmax'",
        ),
        (
            torch.zeros(2, 4),
            1,
            {"scoring": "top_k_then_softmax", "normalise": False},
            "normalise=False has no meaning",
        ),
        (torch.zeros(2, 4), 1, {"scoring": "sigmoid", "bias_E": torch.zeros(3)}, r"\(3,\), expected \(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    logits: Tensor, top_k: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        route(logits, top_k, **options)


SIZES = {"hidden_size": 16, "num_experts_per_tok": 3, "num_local_experts": 8, "num_experts": 8}
STOCK = {
    "mixtral.MixtralTopKRouter": ({}, {"scoring": "top_k_then_softmax"}),
    "olmoe.OlmoeTopKRouter": ({"norm_topk_prob": False}, {"scoring": "softmax_then_top_k", "normalise": False}),
    "qwen3_moe.Qwen3MoeTopKRouter": ({"norm_topk_prob": True}, {"scoring": "softmax_then_top_k"}),
    "deepseek_v3.DeepseekV3TopkRouter": (
        {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5},
        {"scoring": "sigmoid", "scale": 2.5},
    ),
}


@pytest.mark.parametrize("name", STOCK)
def test_it_agrees_with_the_router_of_a_stock_model(name: str) -> None:
    module_name, class_name = name.split(".")
    modeling = pytest.importorskip(f"transformers.models.{module_name}.modeling_{module_name}")
    configuration, options = STOCK[name]
    # Not the config classes, which differ in what they call the number of experts.
    router = getattr(modeling, class_name)(type("Config", (), SIZES | configuration)())
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    if class_name.startswith("Deepseek"):
        router.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(1))
        options = options | {"bias_E": router.e_score_correction_bias}
    logits_TE, stock_TK, stock_index_TK = router(normal(40, 16, seed=2).float())
    index_TK, weights_TK = route(logits_TE, 3, **options)
    by_expert = torch.zeros(40, 8)
    stock_TE, ours_TE = by_expert.scatter(1, stock_index_TK, stock_TK), by_expert.scatter(1, index_TK, weights_TK)
    torch.testing.assert_close(ours_TE, stock_TE)
    upstream_TE = normal(40, 8, seed=3).float()
    gradients = [
        torch.autograd.grad((out * upstream_TE).sum(), router.weight, retain_graph=True)[0]
        for out in (ours_TE, stock_TE)
    ]
    torch.testing.assert_close(*gradients)
