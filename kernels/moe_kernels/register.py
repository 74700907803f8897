"""Makes ``experts_implementation="moe_kernels"`` known to transformers."""

from .experts import experts_forward

NAME = "moe_kernels"


def register() -> None:
    """Adds this package to transformers' experts implementations; calling it again changes nothing.

    Afterwards ``from_pretrained(..., experts_implementation="moe_kernels")`` and
    ``model.set_experts_implementation("moe_kernels")`` work for every model whose experts are SwiGLU stacks of
    ``gate_up_proj`` (E, 2F, D) and ``down_proj`` (E, D, F): Mixtral, GraniteMoeShared, Qwen2Moe and their like.

    Raises:
        ImportError: transformers is missing or older than its experts interface (5.0).
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError("moe_kernels.register() needs transformers >= 5: pip install 'transformers>=5'") from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
