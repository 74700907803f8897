"""How the tests of the Triton forward call it."""

from typing import Any

import torch
from moe_kernels import forward
from moe_kernels.config import Tile
from moe_kernels.routing import Routing, build_routing
from problems import Problem
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
SMALL = Tile(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2, group_m=2)
BY_POINTER = {"TMA": False, "PERSISTENT": False, "BLOCK_E": 4}


def run(p: Problem, *, experts: int, keep_hidden: bool = True, **changes: Any) -> tuple[Tensor, Tensor, Routing]:
    """Output, hidden and routing of the layer on a problem, with some of its tensors changed."""
    given_tensors = {name: tensor.to(DEVICE) for name, tensor in vars(p).items()} | changes
    routing = build_routing(given_tensors["top_k_index_TK"], experts=experts)
    out, hidden = forward.experts_forward_triton(
        given_tensors["x_TD"],
        given_tensors["w13_EGD"],
        given_tensors.get("w3"),
        given_tensors["w2_EDF"],
        weights_TK=given_tensors["top_k_weights_TK"],
        routing=routing,
        keep_hidden=keep_hidden,
    )
    return out, hidden, routing
