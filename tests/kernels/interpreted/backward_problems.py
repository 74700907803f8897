"""The Triton backward on a problem of ``problems.py``: what its cases share."""

from typing import Any

import torch
from moe_kernels.backward import experts_backward_triton
from moe_kernels.routing import Routing, build_routing
from problems import Problem, make_problem
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADS = ("dx", "dw13", "dw3", "dw2", "dweights")
NEEDS = ("need_x", "need_w13", "need_w2", "need_weights")


def small_problem(dtype: torch.dtype = torch.float32) -> Problem:
    return make_problem(40, 4, top_k=2, hidden=33, width=21).rounded(dtype)


def hidden_rows(p: Problem, routing: Routing) -> Tensor:
    """The forward's pre-activations in sorted order, by torch; NaN in the rows of absent experts."""
    assert routing.flat_M is not None
    flat_M = routing.flat_M.cpu().long()
    here = int(routing.offset_E1[-1])
    hidden_MG = torch.full((len(flat_M), p.w13_EGD.shape[1]), float("nan"), dtype=p.x_TD.dtype)
    w13_MGD = p.w13_EGD[p.top_k_index_TK.reshape(-1)[flat_M[:here]]]
    hidden_MG[:here] = (w13_MGD @ p.x_TD[flat_M[:here] // routing.top_k].unsqueeze(2)).squeeze(2)
    return hidden_MG.to(DEVICE)


def gradients(p: Problem, **changes: Any) -> dict[str, Tensor]:
    """By name, those that are not None; with some of the problem's tensors, or a need, changed."""
    tensors = {name: tensor.to(DEVICE) for name, tensor in vars(p).items()} | {"w3": None} | changes
    routing = tensors.get("routing") or build_routing(tensors["top_k_index_TK"], experts=len(tensors["w2_EDF"]))
    hidden_MG = tensors["hidden_MG"] if "hidden_MG" in tensors else hidden_rows(p, routing)
    grads = experts_backward_triton(
        tensors["grad_out_TD"],
        tensors["x_TD"],
        tensors["w13_EGD"],
        tensors["w3"],
        tensors["w2_EDF"],
        hidden_MG,
        weights_TK=tensors["top_k_weights_TK"],
        routing=routing,
        **{need: changes.get(need, True) for need in NEEDS},
    )
    return {name: grad.cpu() for name, grad in zip(GRADS, grads, strict=True) if grad is not None}


def assert_equal_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert torch.equal(grad, expected[name]), name
