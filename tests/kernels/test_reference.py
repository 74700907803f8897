import torch
from moe_kernels import experts_reference
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
