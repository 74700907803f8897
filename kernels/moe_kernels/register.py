"""The experts implementation of transformers: ``experts_implementation="moe_kernels"``.

Shapes: T tokens, D hidden, F intermediate width of one expert, E experts, K top-k.
"""

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.experts import experts_layer

NAME = "moe_kernels"
_WEIGHTS = ("gate_up_proj", "down_proj")
_PARTS = (*_WEIGHTS, "act_fn", "parametrizations")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# The attributes that `use_experts_implementation` sets on a class: (name, supported value, why another is refused).
_LAYOUT = (
    ("has_gate", True, "it has no gate projection"),
    ("is_concatenated", True, "its gate and up rows are interleaved"),
    ("is_transposed", False, "its weights are stored transposed"),
    ("has_bias", False, "its projections have biases"),
    ("has_post_expert_norm", False, "it normalises the output of each expert"),
)


def register() -> None:
    """Adds this package to transformers' experts implementations; calling it again changes nothing.

    Afterwards ``from_pretrained(..., experts_implementation="moe_kernels")`` and
    ``model.set_experts_implementation("moe_kernels")`` work for every model whose experts are SwiGLU stacks of
    ``gate_up_proj`` (E, 2F, D) and ``down_proj`` (E, D, F), such as Mixtral, GraniteMoeShared and Qwen2Moe.

    Raises:
        ImportError: transformers is missing or older than its experts interface (5.0).
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError("moe_kernels.register() needs transformers >= 5: pip install 'transformers>=5'") from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function behind ``experts_implementation="moe_kernels"``.

    Args:
        self: an experts module of transformers 5: ``gate_up_proj`` (E, 2F, D), ``down_proj`` (E, D, F), ``act_fn``.
        hidden_states: tokens, (T, D).
        top_k_index: chosen experts, (T, K); E for an expert of another rank, as expert parallelism marks it.
        top_k_weights: routing weights, (T, K).

    Returns:
        (T, D) in the dtype of ``hidden_states``.

    Raises:
        NotImplementedError: the module has a feature that is not computed here; the message names it and the fix.
    """
    reason = unsupported(self)
    if reason is not None:
        raise NotImplementedError(
            f"experts_implementation='{NAME}' cannot run {type(self).__name__}: {reason}; "
            "load the model with experts_implementation='grouped_mm' or 'eager'"
        )
    gate_up_proj, down_proj = self.gate_up_proj, self.down_proj
    assert isinstance(gate_up_proj, Tensor)
    assert isinstance(down_proj, Tensor)
    return experts_layer(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)


def unsupported(module: nn.Module) -> str | None:
    """Why ``module`` cannot be computed by this package, or None if it can.

    A flag of ``use_experts_implementation`` that the module lacks has its default.
    """
    for flag, value, reason in _LAYOUT:
        if getattr(module, flag, value) != value:
            return f"{reason} ({flag}={not value}), which is not supported"
    apply_gate = getattr(module, "_apply_gate", None)
    if apply_gate is not None and apply_gate.__module__ != "transformers.integrations.moe":
        return "it overrides _apply_gate, and only silu(gate) * up is supported"
    act_fn = getattr(module, "act_fn", None)
    if act_fn is not F.silu and not _is_silu(type(act_fn)):
        name = getattr(act_fn, "__name__", type(act_fn).__name__)
        return f"its activation is {name}, and only SiLU (hidden_act='silu') is supported"
    gate_up_proj: Any = getattr(module, _WEIGHTS[0], None)
    down_proj: Any = getattr(module, _WEIGHTS[1], None)
    if not all(isinstance(weight, Tensor) and weight.dtype in _DTYPES for weight in (gate_up_proj, down_proj)):
        return f"{' and '.join(_WEIGHTS)} are not both tensors of float64, float32, float16 or bfloat16"
    parts = chain(module._parameters.items(), module._buffers.items(), module._modules.items())
    if extra := sorted(name for name, part in parts if part is not None and name not in _PARTS):
        return f"its {', '.join(extra)} would not be computed, only {', '.join(_WEIGHTS)} and silu(gate) * up"
    experts = gate_up_proj.shape[0]
    if getattr(module, "num_experts", experts) != experts:
        return f"its num_experts is {module.num_experts}, and gate_up_proj holds {experts} experts"
    return None


def _is_silu(kind: type) -> bool:
    """By the exact class: a subclass or a namesake may compute something else."""
    return kind is nn.SiLU or (kind.__module__, kind.__name__) == ("transformers.activations", "SiLUActivation")
