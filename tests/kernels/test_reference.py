import math

import pytest
import torch
from moe_kernels import experts_reference
from moe_kernels.reference import router_gradient_reference, router_reference
from problems import make_problem


def test_the_reference_is_the_sum_over_chosen_experts_written_token_by_token() -> None:
    p = make_problem(7, 5, top_k=2, hidden=6, width=3)
    out = experts_reference(p.x_TD, p.w13_EGD, p.w2_EDF, p.top_k_index_TK, p.top_k_weights_TK)
    for t, x_D in enumerate(p.x_TD):
        expected_D = torch.zeros_like(x_D)
        for expert, weight in zip(p.top_k_index_TK[t], p.top_k_weights_TK[t], strict=True):
            gate_F, up_F = p.w13_EGD[expert, :3] @ x_D, p.w13_EGD[expert, 3:] @ x_D
            expected_D += weight * (p.w2_EDF[expert] @ (gate_F / (1 + torch.exp(-gate_F)) * up_F))
        torch.testing.assert_close(out[t], expected_D)


def test_copies_of_one_expert_with_weights_that_sum_to_one_are_the_dense_layer() -> None:
    p = make_problem(9, 1, top_k=1, hidden=8, width=4)
    dense = experts_reference(p.x_TD, p.w13_EGD, p.w2_EDF, torch.zeros(9, 1, dtype=torch.long), torch.ones(9, 1))
    index = torch.rand(9, 4).topk(3).indices
    weights = torch.rand(9, 3, dtype=torch.float64).softmax(-1)
    copies = experts_reference(p.x_TD, p.w13_EGD.expand(4, -1, -1), p.w2_EDF.expand(4, -1, -1), index, weights)
    torch.testing.assert_close(copies, dense)


# Logits log 6, log 3, log 1: a softmax of 0.6, 0.3, 0.1 and sigmoids of 6/7, 3/4, 1/2.
LOGITS_TE = torch.tensor([[6.0, 3.0, 1.0]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("scoring", "normalise", "weights"),
    [
        ("top_k_then_softmax", True, [2 / 3, 1 / 3]),
        ("softmax_then_top_k", True, [2 / 3, 1 / 3]),
        ("softmax_then_top_k", False, [0.6, 0.3]),
        ("sigmoid", False, [6 / 7, 3 / 4]),
        ("sigmoid", True, [8 / 15, 7 / 15]),
    ],
)
def test_the_router_reference_gives_weights_worked_out_by_hand(
    scoring: str, normalise: bool, weights: list[float]
) -> None:
    index_TK, weights_TK = router_reference(LOGITS_TE, 2, scoring=scoring, normalise=normalise, scale=10)
    assert index_TK.tolist() == [[0, 1]]
    assert weights_TK.tolist()[0] == pytest.approx([10 * weight for weight in weights])


def test_the_router_reference_chooses_by_score_plus_bias_and_the_lower_of_equals() -> None:
    bias_E = torch.tensor([0.0, 1.0, 1.5])
    for scoring, chosen in {"top_k_then_softmax": [1, 0], "softmax_then_top_k": [2, 1], "sigmoid": [2, 1]}.items():
        index_TK, _ = router_reference(LOGITS_TE, 2, scoring=scoring, bias_E=bias_E)
        assert index_TK.tolist() == [chosen], scoring
    index_TK, _ = router_reference(torch.zeros(1, 5), 3, scoring="sigmoid")
    assert index_TK.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("scoring", "normalise", "gradient"),
    [
        ("top_k_then_softmax", True, [2 / 9, -2 / 9, 0]),
        ("softmax_then_top_k", True, [2 / 9, -2 / 9, 0]),
        ("softmax_then_top_k", False, [0.24, -0.18, -0.06]),
        ("sigmoid", False, [6 / 49, 0, 0]),
        ("sigmoid", True, [8 / 15 * 7 / 15 / 7, -7 / 15 * 8 / 15 / 4, 0]),
    ],
)
def test_the_router_gradient_reference_gives_gradients_worked_out_by_hand(
    scoring: str, normalise: bool, gradient: list[float]
) -> None:
    """Of the weight of expert 0, when experts 0 and 1 are chosen."""
    grad_TE = router_gradient_reference(
        LOGITS_TE, torch.tensor([[0, 1]]), torch.tensor([[0.1, 0.0]]), scoring=scoring, normalise=normalise, scale=10
    )
    assert grad_TE.tolist()[0] == pytest.approx(gradient)


@pytest.mark.parametrize(("scoring", "normalise"), [("top_k_then_softmax", True), ("softmax_then_top_k", False)])
def test_a_common_shift_of_the_logits_of_a_softmax_changes_neither_weights_nor_gradient(
    scoring: str, normalise: bool
) -> None:
    before, after = (
        router_reference(z_TE, 2, scoring=scoring, normalise=normalise)[1] for z_TE in (LOGITS_TE, LOGITS_TE + 700)
    )
    torch.testing.assert_close(after, before)
    grad_TE = router_gradient_reference(
        LOGITS_TE, torch.tensor([[1, 2]]), torch.tensor([[0.3, -0.7]]), scoring=scoring, normalise=normalise
    )
    assert math.isclose(grad_TE.sum(), 0, abs_tol=1e-15)
