"""Sparse SwiGLU experts layers: Triton on CUDA, hand-written torch elsewhere, one oracle for both.

    import moe_kernels
    moe_kernels.register()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_kernels")

Importing this package imports torch and nothing else; triton and transformers wait until they are used.
"""

from .cpu import choose_regime, experts_torch
from .experts import experts_forward, experts_layer
from .reference import experts_reference
from .register import register

__all__ = ["choose_regime", "experts_forward", "experts_layer", "experts_reference", "experts_torch", "register"]
