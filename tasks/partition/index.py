"""The index file: which neuron of the dense FFN stands where in the experts, for every method alike.

One safetensors file holds, per layer, `layers.<i>` as int32 [shared_experts + experts, expert_size], shared experts
first; its metadata holds what made it. The same seed and inputs give the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Index:
    """Neuron indices of every layer, int32 [shared_experts + experts, expert_size] each, and their provenance."""

    layers: tuple[np.ndarray, ...]
    shared_experts: int
    meta: dict[str, Any]

    @property
    def experts(self) -> int:
        return int(self.layers[0].shape[0]) - self.shared_experts

    @property
    def expert_size(self) -> int:
        return int(self.layers[0].shape[1])

    def problems(self, width: int) -> list[str]:
        """What is wrong with it as a partition of `width` neurons: empty if each stands in exactly one place."""
        found = []
        for layer, experts_EF in enumerate(self.layers):
            if experts_EF.shape != self.layers[0].shape:
                found.append(f"layer {layer} has the shape {experts_EF.shape}, layer 0 {self.layers[0].shape}")
            elif not np.array_equal(np.sort(experts_EF, axis=None), np.arange(width)):
                times = np.bincount(experts_EF.clip(0).reshape(-1), minlength=width)
                wrong = np.flatnonzero(times[:width] != 1)[:5].tolist()
                found.append(
                    f"layer {layer} is no partition of the {width} neurons: {experts_EF.size} entries from "
                    f"{experts_EF.min()} to {experts_EF.max()}; not there exactly once: {wrong}"
                )
        return found


def write(index: Index, path: Path) -> None:
    """Write the file; keys and metadata are ordered, so the same index gives the same bytes."""
    from safetensors.numpy import save

    meta = {"format": "1", "shared_experts": str(index.shared_experts), "meta": json.dumps(index.meta, sort_keys=True)}
    tensors = {f"layers.{i:04d}": np.ascontiguousarray(layer) for i, layer in enumerate(index.layers)}
    path.write_bytes(_ordered(save(tensors, metadata=meta)))


def _ordered(content: bytes) -> bytes:
    """The same safetensors file with its header sorted; the library's order is that of a randomly seeded hash map."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read(path: Path) -> Index:
    """Read an index file. Raises ValueError naming the file if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            layers = tuple(file.get_tensor(name) for name in sorted(file.keys()))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable as a partition index ({error}); run the partition stage") from None
    if metadata.get("format") != "1" or not layers or any(layer.ndim != 2 for layer in layers):
        raise ValueError(f"{path}: not a partition index of format 1; run the partition stage")
    return Index(layers=layers, shared_experts=int(metadata["shared_experts"]), meta=json.loads(metadata["meta"]))
