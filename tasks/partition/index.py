"""The index file: which neuron of the dense FFN stands where in the experts, for every method alike.

One safetensors file holds, per sparse layer i, `layers.<i>` as int32 [shared_experts + experts, expert_size], shared
experts first, and `scales.<i>`, the float32 factor folded into the routed down_proj of that layer; its metadata holds
what made it. Layers that stay dense have no entry. The same seed and inputs give the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from tasks.partition.layer import Sizes
from tasks.settings import Partition

FORMAT = "2"


@dataclass(frozen=True, kw_only=True)
class Index:
    """Neuron indices of every sparse layer, int32 [shared_experts + experts, expert_size] each, and their provenance.

    `layers` and `scales` go by the layer's number in the model; `meta["settings"]` is the settings.Partition.
    """

    layers: dict[int, np.ndarray]
    scales: dict[int, float]
    shared_experts: int
    meta: dict[str, Any]

    @property
    def experts(self) -> int:
        return int(self._any.shape[0]) - self.shared_experts

    @property
    def expert_size(self) -> int:
        return int(self._any.shape[1])

    @property
    def _any(self) -> np.ndarray:
        return next(iter(self.layers.values()))

    @property
    def options(self) -> Partition:
        """The settings that made it. Raises ValueError if the metadata holds none, or none that are valid."""
        if "settings" not in self.meta:
            raise ValueError("its metadata has no `settings`; run the partition stage")
        try:
            return Partition.model_validate(self.meta["settings"])
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise ValueError(f"its settings are not valid here: {faults}; run the partition stage") from None

    def times(self, layer: int, *, width: int) -> np.ndarray:
        """In how many experts, shared ones included, each of the `width` neurons stands: int64 [N]."""
        return np.bincount(self.layers[layer].reshape(-1), minlength=width)

    def dropped(self, width: int) -> float:
        """Share of the sparse layers' neurons that stand in no expert."""
        return float(np.mean([(self.times(layer, width=width) == 0).mean() for layer in self.layers]))

    def problems(self, width: int) -> list[str]:
        """What is wrong with it for FFNs of `width` neurons: empty if every layer keeps the method's own constraints.

        Most methods place every neuron exactly once; moebert, copy and importance with sharing say otherwise.
        """
        try:
            options = self.options
        except ValueError as error:
            return [str(error)]
        sizes = Sizes(
            width=width, experts=self.experts, shared=self.shared_experts, size=self.expert_size, top_k=options.top_k
        )
        wrong = []
        if (self.experts, self.shared_experts) != (options.experts, options.shared_experts):
            wrong.append(
                f"its experts are {self.shared_experts} shared and {self.experts} routed ones, in its settings "
                f"{options.shared_experts} and {options.experts}"
            )
        try:
            if self.expert_size != (size := options.check_width(width)):
                wrong.append(f"its experts have {self.expert_size} neurons, by its settings {size}")
        except ValueError as error:
            wrong.append(str(error))
        for layer, experts_EF in self.layers.items():
            faults = misplaced(experts_EF, sizes=sizes, options=options)
            wrong += [f"layer {layer} {fault}" for fault in faults]
        return wrong


def misplaced(layer_EF: np.ndarray, *, sizes: Sizes, options: Partition) -> list[str]:
    """What is wrong with one layer's neuron indices [S + E, F] under the method's constraints; empty if nothing.

    Every method's experts hold distinct neurons. Beyond that: importance with sharing inner lets experts overlap;
    moebert has `common_neurons` in all experts, and others in one or none; copy has every neuron in as many experts as
    there are copies; token_clusters has those of shared experts nowhere else, and others anywhere; all others have
    every neuron exactly once.

    Returns:
        predicates without a subject ("is no partition of ..."), to be put behind "layer 3".
    """
    shape = (sizes.shared + sizes.experts, sizes.size)
    if layer_EF.shape != shape:
        return [f"has the shape {layer_EF.shape}, but its experts are {shape}"]
    if layer_EF.dtype.kind not in "iu" or layer_EF.min() < 0 or layer_EF.max() >= sizes.width:
        return [
            f"has entries from {layer_EF.min()} to {layer_EF.max()}; allowed: whole numbers, 0 to {sizes.width - 1}"
        ]
    wrong = []
    ordered_EF = np.sort(layer_EF, axis=1)
    if twice := np.unique(ordered_EF[:, 1:][ordered_EF[:, 1:] == ordered_EF[:, :-1]])[:5].tolist():
        wrong.append(f"has experts with a neuron twice: {twice}")
    times_N = np.bincount(layer_EF.reshape(-1), minlength=sizes.width)
    if options.method == "moebert":
        common = options.common_neurons or 0
        everywhere = int((times_N == sizes.experts).sum())
        if everywhere != common and sizes.experts > 1:
            wrong.append(f"has {everywhere} neurons in all {sizes.experts} experts, but common_neurons = {common}")
        if elsewhere := np.flatnonzero((times_N > 1) & (times_N != sizes.experts))[:5].tolist():
            wrong.append(f"has neurons in some experts, neither one nor all: {elsewhere}")
    elif options.method == "token_clusters":
        shared_M = layer_EF[: sizes.shared].reshape(-1)
        if elsewhere := shared_M[times_N[shared_M] != 1][:5].tolist():
            wrong.append(f"has neurons in shared experts and in others: {elsewhere}")
    elif options.sharing != "inner":
        copies = sizes.experts * sizes.size // sizes.width if options.method == "copy" else 1
        if others := np.flatnonzero(times_N != copies)[:5].tolist():
            often = "once" if copies == 1 else f"{copies} times"
            wrong.append(
                f"is no partition of the {sizes.width} neurons under method `{options.method}`: not there exactly "
                f"{often}: {others}"
            )
    return wrong


def write(index: Index, path: Path) -> None:
    """Write the file; keys and metadata are ordered, so the same index gives the same bytes."""
    from safetensors.numpy import save

    meta = {"format": FORMAT, "shared_experts": str(index.shared_experts)}
    meta["meta"] = json.dumps(index.meta, sort_keys=True)
    tensors = {f"layers.{i:04d}": np.ascontiguousarray(layer) for i, layer in index.layers.items()}
    tensors |= {f"scales.{i:04d}": np.array(scale, dtype=np.float32) for i, scale in index.scales.items()}
    path.write_bytes(_ordered(save(tensors, metadata=meta)))


def _ordered(content: bytes) -> bytes:
    """The same safetensors file with its header sorted; the library's order is that of a randomly seeded hash map."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read(path: Path) -> Index:
    """Read an index file. Raises ValueError naming the file and what is wrong with it if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable as a partition index ({error}); run the partition stage") from None
    try:
        return _parse(metadata, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; run the partition stage") from None


def _parse(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> Index:
    if missing := sorted({"format", "shared_experts", "meta"} - set(metadata)):
        raise ValueError(f"no partition index: its metadata has no {', '.join(missing)}")
    if metadata["format"] != FORMAT:
        age = "an older version" if metadata["format"] == "1" else "another version"
        raise ValueError(f"format {metadata['format']}, made by {age}; this one reads format {FORMAT}")
    layers: dict[int, np.ndarray] = {}
    scales: dict[int, float] = {}
    for name, tensor in tensors.items():
        kind, _, number = name.partition(".")
        if kind == "layers" and number.isdecimal() and tensor.ndim == 2 and tensor.size and tensor.dtype == np.int32:
            layers[int(number)] = tensor
        elif kind == "scales" and number.isdecimal() and tensor.ndim == 0 and tensor.dtype == np.float32:
            scales[int(number)] = float(tensor)
        else:
            raise ValueError(f"`{name}` ({tensor.dtype} {list(tensor.shape)}) has no place in a partition index")
    if not layers or set(layers) != set(scales):
        raise ValueError(f"it holds layers {sorted(layers)} and scales for {sorted(scales)}; both must be the same")
    if not all(np.isfinite(scale) and scale for scale in scales.values()):
        raise ValueError(f"scales must be finite and not 0: {scales}")
    try:
        shared, meta = int(metadata["shared_experts"]), json.loads(metadata["meta"])
    except ValueError as error:
        raise ValueError(f"its metadata is damaged ({error})") from None
    rows = min(len(layer) for layer in layers.values())
    if not 0 <= shared < rows or not isinstance(meta, dict):
        raise ValueError(f"its metadata is damaged: {shared} shared experts of {rows}, meta is {type(meta).__name__}")
    return Index(layers=layers, scales=scales, shared_experts=shared, meta=meta)
