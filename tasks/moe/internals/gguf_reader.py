"""What transformers knows of GGUF files: fields of the config, and how llama.cpp stores tensors otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def config_fields(file: Path) -> dict[str, Any]:
    """The fields of config.json that a GGUF file has, by transformers' names."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    fields: dict[str, Any] = load_gguf_checkpoint(file)["config"]
    return fields


def restore(architecture: str, config: Any) -> Callable[[np.ndarray, str], np.ndarray]:
    """A function from a dequantised tensor and its GGUF name to transformers' tensor: a LLaMA's q and k in order."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=config.to_dict())
    return lambda weights, name: processor.process(weights, name).weights
