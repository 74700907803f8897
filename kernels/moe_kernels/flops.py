"""What torch's FLOP counter, which cannot see into the two operators, takes them for: the products that are computed.

    import moe_kernels.flops  # not with the package: the counter's module imports triton

2 FLOPs a multiplication; elementwise operators count nothing, as everywhere in that counter. Rows of absent experts
and padding are counted, since their number is known on the device alone.

Shapes: T tokens, D hidden, F width of one expert, E experts, K top-k, M = T*K routed rows.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import moe_kernels.autograd  # noqa: F401  (defines the operators)


def _product(x: Any, w2: Any, index: Any, path: str) -> int:
    """FLOPs of one product of all rows with one (D, F) weight; the dense path multiplies T * E rows."""
    experts, hidden, width = w2
    if path == "dense":
        return 2 * x[0] * experts * hidden * width
    return 2 * x[0] * (1 if index is None else index[1]) * hidden * width


@register_flop_formula(torch.ops.moe_kernels.experts_forward)
def _forward(
    x: Any, w13: Any, w3: Any, w2: Any, index: Any, weights: Any, offset: Any, path: str, keep: bool, **_: Any
) -> int:
    return 3 * _product(x, w2, index, path)


@register_flop_formula(torch.ops.moe_kernels.experts_backward)
def _backward(
    grad_out: Any,
    x: Any,
    w13: Any,
    w3: Any,
    w2: Any,
    hidden: Any,
    index: Any,
    weights: Any,
    flat: Any,
    inverse: Any,
    offset: Any,
    path: str,
    need_x: bool,
    need_w13: bool,
    need_w2: bool,
    need_weights: bool,
    **_: Any,
) -> int:
    products = (need_x or need_w13 or need_weights) + need_w2 + 2 * need_x + 2 * need_w13
    return products * _product(x, w2, index if path == "dense" else inverse, path)
