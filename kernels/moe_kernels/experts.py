"""The one place that decides which implementation computes an experts layer.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F, E experts, K top-k.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import compute_dtype, experts_torch

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def experts_layer(
    x_TD: Tensor, w13_EGD: Tensor, w2_EDF: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
) -> Tensor:
    """The experts layer of :func:`moe_kernels.reference.experts_reference` by the fastest implementation that fits.

    On CUDA without gradients that is the Triton forward; everywhere else :func:`moe_kernels.cpu.experts_torch`, whose
    backward is correct on every device. Where triton is not installed, CUDA inference takes the torch path too.

    Args and returns: as :func:`moe_kernels.cpu.experts_torch`.
    """
    tensors = (x_TD, w13_EGD, w2_EDF, top_k_weights_TK)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    dtype = compute_dtype(x_TD, w13_EGD)
    if x_TD.is_cuda and not needs_grad and dtype in _TRITON_DTYPES and importlib.util.find_spec("triton"):
        from .grouped import experts_grouped  # triton is imported only where it runs

        cast_TD, cast_EGD, cast_EDF = x_TD.to(dtype), w13_EGD.to(dtype), w2_EDF.to(dtype)
        return experts_grouped(cast_TD, cast_EGD, cast_EDF, top_k_index_TK, top_k_weights_TK).to(x_TD.dtype)
    return experts_torch(x_TD, w13_EGD, w2_EDF, top_k_index_TK, top_k_weights_TK)


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
