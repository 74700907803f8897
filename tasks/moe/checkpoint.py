"""Load checkpoints, dense or sparse; a sparse one computes its experts by moe_kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import architectures
from tasks.moe import allocator

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(
    path: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """Load a causal language model from safetensors, in eval mode; the process keeps its large buffers from then on.

    Its dtype is the stored one if none is given. Raises FileNotFoundError if there is no checkpoint at `path`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no checkpoint here (config.json is missing); run the stage that writes it")
    disable_progress_bar()
    allocator.keep_buffers()
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    options: dict[str, Any] = {}
    if architectures.is_moe(config):
        import moe_kernels

        moe_kernels.register()
        options["experts_implementation"] = "moe_kernels"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, **options
    )
    if device is not None:
        torch.nn.Module.to(model, torch.device(device))
    model.eval()
    return model
