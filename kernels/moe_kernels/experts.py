"""The experts layer: checks its arguments and chooses the path and dtype that compute it.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M rows sorted by expert.
"""

import importlib.util
from typing import get_args

import torch
from torch import Tensor

import moe_kernels.autograd as autograd
import moe_kernels.few_rows as few_rows

from .autograd import Path
from .cpu import choose_regime
from .routing import presorted_routing

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_INDEX_DTYPES = (torch.int32, torch.int64)
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
        top_k_index_TK: chosen experts, int32 or int64 in ``[0, E]``, (T, K). E is an absent expert and adds nothing:
            the mark that expert parallelism gives to the experts of other ranks.
        top_k_weights_TK: routing weights, (T, K), any floating dtype; need not sum to one.
        path: forces a path, for tests and benchmarks. By default ``"triton"`` on CUDA of sm_80 and newer where it is
            installed (fp32, fp16, bf16); on CPU :mod:`moe_kernels.few_rows` for a token or two without gradients, else
            the choice of :func:`moe_kernels.cpu.choose_regime`; and ``"sorted"`` elsewhere.

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
        if few_rows.fits(x_TD, w13_EGD, w2_EDF, top_k=top_k) and not _keeps(x_TD, w13_EGD, w2_EDF, top_k_weights_TK):
            return few_rows.forward(x_TD, w13_EGD, w2_EDF, weights_TK=top_k_weights_TK, index_TK=top_k_index_TK)
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
        counts_E: rows of each expert, int32 or int64 whose sum is at most M, (E,).
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
    path = path or _path_of_device(x_MD, dtype) or "sorted"
    offset_E1 = presorted_routing(counts_E).offset_E1
    return _apply(x_MD, w13, w3_EFD, w2_EDF, None, None, offset_E1, path=path, dtype=dtype)


def compute_dtype(x: Tensor, w13: Tensor) -> torch.dtype:
    """The dtype of the GEMMs: autocast's where it is on (never for fp64), otherwise that of the weights."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and torch.float64 not in (x.dtype, w13.dtype):
        return torch.get_autocast_dtype(device)
    return w13.dtype


def _path_of_device(x: Tensor, dtype: torch.dtype) -> Path | None:
    """The path of a device that has but one; None on CPU. The kernels are compiled for NVIDIA's sm_80 and newer."""
    if x.is_cuda and dtype in _TRITON_DTYPES and _TRITON_INSTALLED and torch.version.hip is None:
        return "triton" if torch.cuda.get_device_properties(x.device).major >= 8 else "sorted"
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
    keep = _keeps(x, w13, w3, w2, weights)
    out: torch.Tensor = autograd.experts_forward(x.to(dtype), w13, w3, w2, index, weights, offset, path, keep)[0]
    return out.to(x.dtype)


def _keeps(*tensors: Tensor | None) -> bool:
    """True if a backward may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
        if not (tensor.dtype in _INDEX_DTYPES if integer else tensor.is_floating_point()):
            expected = "int32 or int64" if integer else "a floating dtype"
            raise ValueError(f"experts layer: {name} is {tensor.dtype}, expected {expected}")
