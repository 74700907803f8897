"""Sparse SwiGLU experts layers: Triton on CUDA, torch operators elsewhere, one reference for both.

    import moe_kernels
    moe_kernels.register()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_kernels")

Importing this package imports torch only; triton, transformers and deepspeed are imported where they are used.
"""

from .autoep import use_in_deepspeed
from .cpu import choose_regime
from .experts import experts_layer, experts_sorted
from .reference import experts_reference
from .register import experts_forward, register

__all__ = [
    "choose_regime",
    "experts_forward",
    "experts_layer",
    "experts_reference",
    "experts_sorted",
    "register",
    "use_in_deepspeed",
]
