"""The experts layer as two custom operators, forward and backward, over the three paths.

``torch.compile`` sees one node for each. Saved for backward are the tokens, the Parameters themselves, the
pre-activations, and the part of the routing that the path reads: s(TD + 2MF) + 12M bytes with fp32 routing weights and
s bytes an element. A saved view or cast copy of a weight would keep the weight alive until backward, which defeats
ZeRO-3, so casts are made again in backward.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M = T*K rows sorted by expert.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import moe_kernels.dense_path as dense_path
import moe_kernels.sorted_path as sorted_path

from .routing import Routing, build_routing
from .sorted_rows import hidden_rows

Path = Literal["sorted", "dense", "triton"]


@torch.library.custom_op("moe_kernels::experts_forward", mutates_args=())
def experts_forward(
    x: Tensor,
    w13: Tensor,
    w3: Tensor | None,
    w2: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    offset: Tensor | None,
    path: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The layer in the dtype of ``x``, and the tensors its backward reads.

    Args:
        x: tokens (T, D) in the dtype of the GEMMs.
        w13: ``[gate; up]`` (E, 2F, D), or the gate alone (E, F, D) where ``w3`` is given; any floating dtype.
        w3: up projections (E, F, D), or None.
        w2: down projections (E, D, F).
        index: chosen experts (T, K); None for rows that came sorted.
        weights: routing weights (T, K); None for rows that came sorted.
        offset: first row of each expert and the end of the last, int32 (E + 1), for rows that came sorted.
        path: ``"sorted"``, ``"dense"`` or ``"triton"``.
        keep: whether a backward will follow.

    Returns:
        out (T, D); pre-activations (M, G), of the sorted path with its copies, of the dense path (T, E * G);
        ``flat_M``, ``inverse_TK`` and ``offset_E1`` of :mod:`moe_kernels.routing`. Empty where the path has none, or
        ``keep`` is false.
    """
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        if path == "dense":
            assert index is not None
            assert weights is not None
            out_TD, hidden = dense_path.forward(x, w13, None, w2, weights_TK=weights, index_TK=index)
            return out_TD, hidden if keep else x.new_empty(0), *_no_routing(x)
        routing = _routing(index, offset, experts=w2.shape[0])
        forward = sorted_path.forward if path == "sorted" else _triton_forward(x)
        out_TD, hidden = forward(x, w13, w3, w2, weights_TK=weights, routing=routing, keep_hidden=keep)
        if not keep:
            return out_TD, x.new_empty(0), *_no_routing(x)
        if routing.flat_M is None or routing.inverse_TK is None:
            return out_TD, hidden, *_no_routing(x)
        return out_TD, hidden, routing.flat_M, routing.inverse_TK, routing.offset_E1


@torch.library.custom_op("moe_kernels::experts_backward", mutates_args=())
def experts_backward(
    grad_out: Tensor,
    x: Tensor,
    w13: Tensor,
    w3: Tensor | None,
    w2: Tensor,
    hidden: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    flat: Tensor | None,
    inverse: Tensor | None,
    offset: Tensor | None,
    path: str,
    need_x: bool,
    need_w13: bool,
    need_w2: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w13, w3, w2 and the routing weights, each in the dtype of its input; empty where not needed.

    Only the dense path takes ``index``; only the others take ``flat``, ``inverse`` and ``offset``. The other arguments
    are those of :func:`experts_forward`.
    """
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        backward: Callable[..., tuple[Tensor | None, ...]] = dense_path.backward
        rows: dict[str, Any] = {"index_TK": index}
        if path != "dense":
            assert offset is not None
            top_k = 1 if inverse is None else inverse.shape[1]
            routing = Routing(top_k=top_k, offset_E1=offset, flat_M=flat, inverse_TK=inverse)
            backward = sorted_path.backward if path == "sorted" else _triton_backward()
            rows = {"routing": routing}
        grads: tuple[Tensor | None, ...] = backward(
            grad_out,
            x,
            w13,
            w3,
            w2,
            hidden,
            weights_TK=weights,
            need_x=need_x,
            need_w13=need_w13,
            need_w2=need_w2,
            need_weights=need_weights,
            **rows,
        )
    x_grad, w13_grad, w3_grad, w2_grad, weights_grad = (x.new_empty(0) if grad is None else grad for grad in grads)
    return x_grad, w13_grad, w3_grad, w2_grad, weights_grad


def require_device(x: Tensor) -> None:
    """Raises ValueError unless Triton can run on the device of ``x``: CUDA, or any in Triton's interpreter."""
    from triton import knobs

    if not x.is_cuda and not knobs.runtime.interpret:
        raise ValueError(
            f"experts layer: path='triton' needs CUDA tensors, x is on {x.device}; use path='sorted' there, or run "
            "Triton's interpreter by setting TRITON_INTERPRET=1 before the first import of triton"
        )


def _triton_forward(x: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    require_device(x)
    from .forward import experts_forward_triton

    return experts_forward_triton


def _triton_backward() -> Callable[..., tuple[Tensor | None, ...]]:
    from .backward import experts_backward_triton

    return experts_backward_triton


def _routing(index_TK: Tensor | None, offset_E1: Tensor | None, *, experts: int) -> Routing:
    if index_TK is not None:
        return build_routing(index_TK, experts=experts)
    assert offset_E1 is not None
    return Routing(top_k=1, offset_E1=offset_E1)


def _no_routing(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors, because the outputs of an operator may not alias."""
    return x.new_empty(0, dtype=torch.int32), x.new_empty(0, dtype=torch.int32), x.new_empty(0, dtype=torch.int32)


@experts_forward.register_fake
def _forward_shapes(
    x: Tensor, w13: Tensor, w3: Tensor | None, w2: Tensor, index: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *_, path, keep = rest
    out = x.new_empty(x.shape)
    experts, _, width = w2.shape
    tokens = x.shape[0]
    if not keep:
        return out, x.new_empty(0), *_no_routing(x)
    if path == "dense":
        return out, x.new_empty(tokens, 2 * width * experts), *_no_routing(x)
    if index is None:
        return out, x.new_empty(tokens, 2 * width), *_no_routing(x)
    rows = tokens * index.shape[1]
    flat, inverse, offset_E1 = (index.new_empty(s, dtype=torch.int32) for s in ((rows,), index.shape, (experts + 1,)))
    if path == "sorted":
        rows = hidden_rows(rows, experts=experts, dtype=x.dtype, device=x.device.type)
    return out, x.new_empty(rows, 2 * width), flat, inverse, offset_E1


@experts_backward.register_fake
def _gradient_shapes(
    grad_out: Tensor, x: Tensor, w13: Tensor, w3: Tensor | None, w2: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    _, _, weights, *_, need_x, need_w13, need_w2, need_weights = rest
    needed = ((x, need_x), (w13, need_w13), (w3, need_w13), (w2, need_w2), (weights, need_weights))
    return tuple(x.new_empty(0) if t is None or not need else t.new_empty(t.shape) for t, need in needed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w13, w3, w2, index, weights, offset, ctx.path, ctx.keep = inputs
    _, hidden, flat, inverse, offset_E1 = output
    ctx.set_materialize_grads(False)  # or autograd would fill a gradient of zeros for the pre-activations
    ctx.mark_non_differentiable(*output[1:])
    if not ctx.keep:
        return
    routing: tuple[Tensor | None, ...]
    if ctx.path == "dense":
        routing = index, weights, None, None, None
    elif index is None:
        routing = None, None, None, None, offset
    else:
        routing = None, weights, flat, inverse, offset_E1
    ctx.save_for_backward(x, w13, w3, w2, hidden, *routing)


def _backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if not ctx.keep:
        raise RuntimeError("experts layer: experts_forward ran with keep=False, which keeps nothing for a backward")
    need_x, need_w13, need_w3, need_w2, _, need_weights, *_ = ctx.needs_input_grad
    if grad_out is None:
        return (None,) * 9
    x_grad, w13_grad, w3_grad, w2_grad, weights_grad = torch.ops.moe_kernels.experts_backward(
        grad_out, *ctx.saved_tensors, ctx.path, need_x, need_w13 or need_w3, need_w2, need_weights
    )
    return (
        x_grad if need_x else None,
        w13_grad if need_w13 else None,
        w3_grad if need_w3 else None,
        w2_grad if need_w2 else None,
        None,
        weights_grad if need_weights else None,
        None,
        None,
        None,
    )


def _second_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "experts layer: second derivatives are not computed; call backward without create_graph=True, or use "
        "moe_kernels.experts_reference where they are needed"
    )


experts_forward.register_autograd(_backward, setup_context=_setup_context)
experts_backward.register_autograd(_second_backward)
