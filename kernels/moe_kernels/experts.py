"""The one place that decides which path computes an experts layer, and in which dtype.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M rows sorted by expert.
"""

import importlib.util
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_kernels.autograd as autograd

from .autograd import Path
from .cpu import choose_regime

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def experts_layer(
    x_TD: Tensor,
    w13_EGD: Tensor,
    w2_EDF: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    *,
    path: Path | None = None,
) -> Tensor:
    """The dropless layer of :func:`moe_kernels.reference.experts_reference`, by the fastest path that fits.

    Args:
        x_TD: tokens, (T, D), any strides; T may be 0.
        w13_EGD: ``[gate; up]`` projections, (E, 2F, D); pass the Parameter itself, not a view or a cast of it.
        w2_EDF: down projections, (E, D, F); the same holds.
        top_k_index_TK: chosen experts, integers in ``[0, E]``, (T, K). E is an absent expert, which adds nothing: the
            mark that expert parallelism gives to the experts of other ranks.
        top_k_weights_TK: routing weights, (T, K), any floating dtype; need not sum to one.
        path: forces a path, for tests and benchmarks. By default ``"triton"`` on CUDA where it is installed (fp32,
            fp16, bf16), what :func:`moe_kernels.cpu.choose_regime` says on CPU, and ``"sorted"`` elsewhere.

    Returns:
        (T, D) in the dtype of ``x_TD``. Under autocast the GEMMs run in its dtype, otherwise in that of ``w13_EGD``.
        A gradient has the dtype of its input; that of an expert without tokens is zero.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``path`` cannot run there; the message names the tensor.
        IndexError: an index is outside ``[0, E]``; on CUDA, where reading it would stall the device, it counts as E.
    """
    _check(x_TD, w13_EGD, None, w2_EDF, top_k_index=top_k_index_TK, top_k_weights=top_k_weights_TK)
    dtype = compute_dtype(x_TD, w13_EGD)
    if path is None:
        tokens, top_k = top_k_index_TK.shape
        experts, _, width = w2_EDF.shape
        path = _path_of_device(x_TD, dtype) or choose_regime(experts, top_k, width=width, tokens=tokens, dtype=dtype)
    return _apply(x_TD, w13_EGD, None, w2_EDF, top_k_index_TK, top_k_weights_TK, None, path=path, dtype=dtype)


def experts_sorted(
    x_MD: Tensor,
    w13: Tensor,
    w2_EDF: Tensor,
    counts_E: Tensor,
    *,
    w3_EFD: Tensor | None = None,
    path: Path | None = None,
) -> Tensor:
    """SwiGLU experts over rows that came sorted by expert: ``out[m] = W2[e] (silu(Wgate[e] x[m]) * (Wup[e] x[m]))``.

    Args:
        x_MD: rows, those of expert 0 first, (M, D); rows past the sum of the counts are padding.
        w13: ``[gate; up]`` projections, (E, 2F, D); or the gate alone, (E, F, D), where ``w3_EFD`` is given.
        w2_EDF: down projections, (E, D, F).
        counts_E: rows of each expert, integers whose sum is at most M, (E,).
        w3_EFD: up projections, (E, F, D), if they are not in ``w13``.
        path: ``"sorted"`` or ``"triton"``; as in :func:`experts_layer`.

    Returns:
        (M, D) in the dtype of ``x_MD``; padding is zero, and so is its gradient. dtypes as in :func:`experts_layer`.

    Raises:
        ValueError: as in :func:`experts_layer`. The sum of the counts is not checked.
    """
    if path == "dense":
        raise ValueError("experts layer: path='dense' needs a top_k_index, use 'sorted' or 'triton' for sorted rows")
    _check(x_MD, w13, w3_EFD, w2_EDF, counts=counts_E)
    dtype = compute_dtype(x_MD, w13)
    offset_E1 = F.pad(counts_E.cumsum(0), (1, 0)).int()
    path = path or _path_of_device(x_MD, dtype) or "sorted"
    return _apply(x_MD, w13, w3_EFD, w2_EDF, None, None, offset_E1, path=path, dtype=dtype)


def compute_dtype(x: Tensor, w13: Tensor) -> torch.dtype:
    """The dtype of the GEMMs: autocast's where it is on (never for fp64), otherwise that of the weights."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, w13.dtype):
        return torch.get_autocast_dtype(device)
    return w13.dtype


def _path_of_device(x: Tensor, dtype: torch.dtype) -> Path | None:
    """The path of a device that has but one; None on CPU."""
    if x.is_cuda and dtype in _TRITON_DTYPES and _TRITON_INSTALLED:
        return "triton"
    return None if x.device.type == "cpu" else "sorted"


def _apply(
    x: Tensor,
    w13: Tensor,
    w3: Tensor | None,
    w2: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    offset: Tensor | None,
    *,
    path: Path,
    dtype: torch.dtype,
) -> Tensor:
    if path not in get_args(Path):
        raise ValueError(f"experts layer: path is {path!r}, expected one of {', '.join(get_args(Path))}")
    if path == "triton" and dtype not in _TRITON_DTYPES:
        raise ValueError(f"experts layer: path='triton' computes in fp32, fp16 or bf16, not in {dtype}; use 'sorted'")
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w13, w3, w2, weights))
    out, *_ = autograd.experts_forward(x.to(dtype), w13, w3, w2, index, weights, offset, path, keep)
    return out.to(x.dtype)


def _check(x: Tensor, w13: Tensor, w3: Tensor | None, w2: Tensor, **routing: Tensor) -> None:
    """Raises ValueError, naming the tensor and what it should be, unless shapes, dtypes and devices agree."""
    if x.dim() != 2 or w13.dim() != 3:
        raise ValueError(
            f"experts layer: expected x (T, D) and w13 (E, 2F, D), got {tuple(x.shape)} and {tuple(w13.shape)}"
        )
    rows, hidden = x.shape
    experts, width = w13.shape[0], w13.shape[1] // (2 if w3 is None else 1)
    top_k = routing["top_k_index"].shape[-1] if "top_k_index" in routing else 0
    shapes = {
        "x": (rows, hidden),
        "w13": (experts, 2 * width if w3 is None else width, hidden),
        "w3": (experts, width, hidden),
        "w2": (experts, hidden, width),
        "top_k_index": (rows, top_k),
        "top_k_weights": (rows, top_k),
        "counts": (experts,),
    }
    for name, tensor in ({"x": x, "w13": w13, "w2": w2} | ({} if w3 is None else {"w3": w3}) | routing).items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"experts layer: {name} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
        if tensor.device != x.device:
            raise ValueError(f"experts layer: {name} is on {tensor.device} and x on {x.device}; move one of them")
        integer = name in ("top_k_index", "counts")
        if tensor.is_floating_point() == integer or tensor.dtype is torch.bool:
            kind = "an integer" if integer else "a floating"
            raise ValueError(f"experts layer: {name} is {tensor.dtype}, expected {kind} dtype")


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function behind ``experts_implementation="moe_kernels"``.

    Args:
        self: an experts module of transformers 5: ``gate_up_proj`` (E, 2F, D), ``down_proj`` (E, D, F), ``act_fn``.
        hidden_states: tokens, (T, D).
        top_k_index: chosen experts, (T, K).
        top_k_weights: routing weights, (T, K).

    Returns:
        (T, D) in the dtype of ``hidden_states``.

    Raises:
        NotImplementedError: the module has a feature that is not computed here; the message names it and the mend.
    """
    reason = unsupported(self)
    if reason is not None:
        raise NotImplementedError(
            f"experts_implementation='moe_kernels' cannot run {type(self).__name__}: {reason}; "
            "load the model with experts_implementation='grouped_mm' or 'eager'"
        )
    gate_up_proj, down_proj = self.gate_up_proj, self.down_proj
    assert isinstance(gate_up_proj, Tensor)
    assert isinstance(down_proj, Tensor)
    return experts_layer(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)


def unsupported(module: nn.Module) -> str | None:
    """Why ``module`` cannot be computed by this package, or None if it can.

    The flags are those that ``use_experts_implementation`` of transformers 5 sets; one that is absent has its default.
    """
    act_fn = getattr(module, "act_fn", None)
    if act_fn is not F.silu and type(act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        name = getattr(act_fn, "__name__", type(act_fn).__name__)
        return f"its activation is {name}, and only SiLU (hidden_act='silu') is supported"
    if not getattr(module, "has_gate", True):
        return "it has no gate projection (has_gate=False)"
    if not getattr(module, "is_concatenated", True):
        return "its gate and up rows are interleaved (is_concatenated=False), and only [gate; up] is supported"
    apply_gate = getattr(type(module), "_apply_gate", None)
    if apply_gate is not None and apply_gate.__module__ != "transformers.integrations.moe":
        return "it overrides _apply_gate, and only silu(gate) * up is supported"
    refused = {
        "is_transposed": "its weights are stored transposed",
        "has_bias": "its projections have biases",
        "has_post_expert_norm": "it normalises the output of each expert",
        "_is_expert_parallel": "expert parallelism marks absent experts by sentinel indices",
    }
    for flag, reason in refused.items():
        if getattr(module, flag, False):
            return f"{reason} ({flag}=True), which is not supported"
    return None
