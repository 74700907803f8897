"""LLaMA-MoE's two-layer gate (arXiv 2406.16554) in the place of a stock linear router.

logits = outer tanh(inner x), without biases; the top k of them, softmax in float32 over the k. In training, where the
gate has noise weights: + N(0, 1) * (softplus(noise x) + 0.01), after Shazeer et al. (arXiv 1701.06538, eq. 4). The
load loss that goes with that noise is not here: training balances by the Switch loss.

No stock class has such a gate, so the weights stand beside a stock checkpoint, in `gates.safetensors`, as
`layers.<i>.gate.{0,2}.weight` and `layers.<i>.noise.weight`. Shapes: T tokens, D hidden, E routed experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

FILE = "gates.safetensors"
INIT_STD = 0.02
NOISE_EPSILON = 0.01
_FIELDS = {"gate.0": "inner_ED", "gate.2": "outer_EE", "noise": "noise_ED"}
_NAME = re.compile(r"(?:|.*\.)layers\.(\d+)\.(?:.*\.)?(gate\.0|gate\.2|noise)\.weight")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The weights of one layer's gate; without noise_ED it trains without noise."""

    inner_ED: torch.Tensor
    outer_EE: torch.Tensor
    noise_ED: torch.Tensor | None = None

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """What the gate gives without noise, in the dtype of x: [T, E]."""
        return torch.tanh(x_TD @ self.inner_ED.to(x_TD).T) @ self.outer_EE.to(x_TD).T


def start(experts: int, hidden: int, *, seed: int, layer: int) -> Gate:
    """A fresh gate as LLaMA-MoE starts its own: weights N(0, 0.02), noise weights 0; float32."""
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    return Gate(
        inner_ED=torch.randn(experts, hidden, generator=generator) * INIT_STD,
        outer_EE=torch.randn(experts, experts, generator=generator) * INIT_STD,
        noise_ED=torch.zeros(experts, hidden),
    )


def from_linear(router_ED: torch.Tensor) -> Gate:
    """A gate that chooses as a linear router does, since tanh keeps the order; without noise, which would drown it.

    Its weights are the router's up to the cube of the logits.
    """
    return Gate(inner_ED=router_ED, outer_EE=torch.eye(len(router_ED), dtype=router_ED.dtype))


def write(folder: Path, gates: dict[int, Gate]) -> None:
    """Write the gates, by layer, into a checkpoint folder."""
    tensors = {
        f"layers.{layer}.{name}.weight": value.contiguous()
        for layer, gate in sorted(gates.items())
        for name, field in _FIELDS.items()
        if (value := getattr(gate, field)) is not None
    }
    save_file(tensors, folder / FILE)
    (folder / FILE).chmod(0o644)  # safetensors writes 0600


def read(folder: Path) -> dict[int, Gate]:
    """The gates beside a checkpoint, by layer; none if there is no file.

    Raises:
        ValueError: the file is damaged, or a tensor is missing or unknown.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); write it again") from None
    gates = _take(tensors, path)
    if tensors:
        raise ValueError(f"{path}: unknown tensors {sorted(tensors)[:5]}; known: layers.<i>.{{{','.join(_FIELDS)}}}")
    return gates


def take_out(weights: dict[str, torch.Tensor]) -> dict[int, Gate]:
    """Take the gates out of the weights of a model that they are swapped into, by layer.

    A zero router of the stock class takes the place of each in `weights`.
    """
    routers = {name.removesuffix("gate.0.weight") + "weight": name for name in weights if _inner(name)}
    zeros = {router: torch.zeros_like(weights[name]) for router, name in routers.items()}
    gates = _take(weights, "the trained weights")
    weights |= zeros
    return gates


def swap_in(model: nn.Module, gates: dict[int, Gate]) -> None:
    """Turn the routers of these layers into gates, in place; they keep their dtype, device, top_k and hooks.

    Raises:
        ValueError: a layer has no router, or one of another shape or with weights that do not sum to 1.
    """
    layers: Any = model.base_model.layers  # type: ignore[union-attr]
    for layer, gate in gates.items():
        if layer >= len(layers):
            raise ValueError(f"{FILE}: layer {layer} is not there; the model has layers 0 to {len(layers) - 1}")
        try:
            swap(router(layers[layer]), gate)
        except ValueError as error:
            raise ValueError(f"{FILE}: layer {layer}: {error}") from None


def router(block: nn.Module) -> nn.Module:
    """The router of one decoder layer. Raises ValueError if the layer is dense."""
    for module in block.modules():
        if type(module).__name__.endswith("TopKRouter"):
            return module
    raise ValueError("the layer is dense, and has no router")


def swap(router: nn.Module, gate: Gate) -> None:
    """Turn one stock router into the gate, in place. Raises ValueError if it does not fit."""
    weight: Any = router.weight
    if weight.shape != gate.inner_ED.shape:
        raise ValueError(f"gate.0.weight is {list(gate.inner_ED.shape)}, the router's {list(weight.shape)}")
    if not getattr(router, "norm_topk_prob", True):
        raise ValueError("config.json has norm_topk_prob = false, and the gate's weights sum to 1; set it to true")
    del router.weight
    experts, hidden = weight.shape
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    inner, outer = (nn.Linear(width, experts, bias=False, **place) for width in (hidden, experts))
    router.gate = nn.Sequential(inner, nn.Tanh(), outer)
    noise = None if gate.noise_ED is None else nn.Linear(hidden, experts, bias=False, **place)
    router.register_module("noise", noise)
    # The stock class multiplies by its weight, then chooses and weighs in its own dtypes: let it, by the logits.
    router.register_buffer("weight", torch.eye(experts, **place), persistent=False)
    router.hidden_dim = experts
    router.__class__ = type("TanhTopKRouter", (_Tanh, type(router)), {})  # transformers records by isinstance
    with torch.no_grad():
        inner.weight.copy_(gate.inner_ED)
        outer.weight.copy_(gate.outer_EE)
        if noise is not None and gate.noise_ED is not None:
            noise.weight.copy_(gate.noise_ED)


class _Tanh(nn.Module):
    gate: nn.Sequential
    noise: nn.Linear | None

    def forward(self, hidden_states: torch.Tensor) -> Any:
        x_TD = hidden_states.flatten(0, -2)
        logits_TE = self.gate(x_TD)
        if self.training and self.noise is not None:
            logits_TE = logits_TE + torch.randn_like(logits_TE) * (F.softplus(self.noise(x_TD)) + NOISE_EPSILON)
        return super().forward(logits_TE)


def _inner(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return bool(match and match[2] == "gate.0")


def _take(tensors: dict[str, torch.Tensor], source: Path | str) -> dict[int, Gate]:
    """Pop the gates' tensors. Raises ValueError if a gate lacks one."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name in list(tensors):
        if match := _NAME.fullmatch(name):
            found.setdefault(int(match[1]), {})[_FIELDS[match[2]]] = tensors.pop(name)
    for layer, fields in found.items():
        for name in ("gate.0", "gate.2"):
            if _FIELDS[name] not in fields:
                raise ValueError(f"{source}: layers.{layer}.{name}.weight is missing; write the file again")
    return {layer: Gate(**fields) for layer, fields in sorted(found.items())}
