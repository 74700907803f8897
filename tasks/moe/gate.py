"""Routers that training can use instead of a stock linear one, and the file beside a stock checkpoint that keeps them.

- LLaMA-MoE's two-layer gate (arXiv 2406.16554): logits = outer tanh(inner x), without biases.
- Noise in training, after Shazeer et al. (arXiv 1701.06538, eq. 4): + N(0, 1) * (softplus(noise x) + 0.01).
- A bias on the choice (arXiv 2408.15664): the top k of logits + bias, weighed by the logits.

None of the classes that are written has any of these, so what a linear router cannot express stands beside them, in
`gates.safetensors`: `layers.<i>.gate.{0,2}.weight` or `layers.<i>.linear.weight`, `layers.<i>.noise.weight`,
`layers.<i>.selection_bias`. Shapes: T tokens, D hidden, E routed experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tasks import architectures
from tasks.moe import routing
from tasks.moe.internals.layers import decoder_layers, is_router
from tasks.moe.internals.training_router import TrainingRouter, extend

FILE = "gates.safetensors"
INIT_STD = 0.02
_FIELDS = {
    "gate.0.weight": "inner_ED",
    "gate.2.weight": "outer_EE",
    "linear.weight": "inner_ED",
    "noise.weight": "noise_ED",
    "selection_bias": "bias_E",
}
_NAME = re.compile(r"(?:|.*\.)layers\.(\d+)\.(?:.*\.)?(" + "|".join(map(re.escape, _FIELDS)) + ")")
_ROUTERS = "|".join(sorted({row.router for row in architectures.SPARSE.values()}))
_ROUTER = re.compile(r"(?:|.*\.)layers\.(\d+)\.(?:.*\.)?(?:" + _ROUTERS + r")\.weight")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One layer's router as it trains."""

    inner_ED: torch.Tensor
    outer_EE: torch.Tensor | None = None
    """Without it the router is linear."""
    noise_ED: torch.Tensor | None = None
    """Without it there is no noise."""
    bias_E: torch.Tensor | None = None
    """fp32; without it the choice is by the logits."""

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """What it gives without noise and bias, in the dtype of x: [T, E]."""
        inner_TE = x_TD @ self.inner_ED.to(x_TD).T
        return inner_TE if self.outer_EE is None else torch.tanh(inner_TE) @ self.outer_EE.to(x_TD).T


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
        f"layers.{layer}.{name}": value.contiguous()
        for layer, gate in sorted(gates.items())
        for name, field in _FIELDS.items()
        if (value := getattr(gate, field)) is not None
        and name != ("gate.0.weight" if gate.outer_EE is None else "linear.weight")
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


def take_out(weights: dict[str, torch.Tensor], *, biases: list[list[float]] | None = None) -> dict[int, Gate]:
    """Take what the stock class does not have out of the weights of a model, as gates by layer.

    In `weights` a zero router of the stock class takes the place of each two-layer gate; a linear router stays. The
    noise of a linear router is dropped: it is no part of what the trained model computes.

    Args:
        weights: whole tensors by the names of the model in training.
        biases: what `biases(model)` gives; a biased linear router is among the gates, with its bias.
    """
    routers = {
        name.removesuffix("gate.0.weight") + "weight": name for name in weights if _matches(name, "gate.0.weight")
    }
    zeros = {router: torch.zeros_like(weights[name]) for router, name in routers.items()}
    for name in list(weights):
        if _matches(name, "noise.weight") and name.removesuffix("noise.weight") + "weight" not in routers:
            del weights[name]
    gates = _take(weights, "the trained weights")
    weights |= zeros
    if biases:
        linear = {int(match[1]): weights[name] for name in weights if (match := _ROUTER.fullmatch(name))}
        for (layer, router_ED), values in zip(sorted(linear.items()), biases, strict=True):
            gate = gates.get(layer) or Gate(inner_ED=router_ED)
            gates[layer] = replace(gate, bias_E=torch.tensor(values, device=router_ED.device))
    return dict(sorted(gates.items()))


def swap_in(model: nn.Module, gates: dict[int, Gate]) -> None:
    """Turn the routers of these layers into gates, in place; they keep their dtype, device, top_k and hooks.

    Raises:
        ValueError: a layer has no router, or one of another shape, or whose weights do not sum to 1 as a two-layer
            gate's do.
    """
    layers = decoder_layers(model)
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
        if is_router(module):
            return module
    raise ValueError("the layer is dense, and has no router")


def swap(router: nn.Module, gate: Gate) -> None:
    """Turn one stock router into the gate, in place. Raises ValueError if it does not fit."""
    weight: Any = router.weight
    if weight.shape != gate.inner_ED.shape:
        name = "linear" if gate.outer_EE is None else "gate.0"
        raise ValueError(f"{name}.weight is {list(gate.inner_ED.shape)}, the router's {list(weight.shape)}")
    if gate.outer_EE is not None and not getattr(router, "norm_topk_prob", True):
        raise ValueError("config.json has norm_topk_prob = false, and the gate's weights sum to 1; set it to true")
    made = extend(router)
    experts, hidden = weight.shape
    with torch.no_grad():
        if gate.outer_EE is None:
            weight.copy_(gate.inner_ED)
        else:
            del made.weight
            like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype, "bias": False}
            inner, outer = nn.Linear(hidden, experts, **like), nn.Linear(experts, experts, **like)
            inner.weight.copy_(gate.inner_ED)
            outer.weight.copy_(gate.outer_EE)
            made.gate = nn.Sequential(inner, nn.Tanh(), outer)
        if gate.noise_ED is not None:
            _add_noise(made, like=weight).weight.copy_(gate.noise_ED)
        if gate.bias_E is not None:
            _add_bias(made, like=weight).copy_(gate.bias_E)


def add_noise(model: nn.Module) -> None:
    """Let every router train with noisy top-k (arXiv 1701.06538, eq. 4), from noise weights 0: a deviation of 0.703.

    In training mode alone: + N(0, 1) * (softplus(noise x) + 0.01), drawn from torch's global generator of the logits'
    device. Routers that have noise weights keep them. Call it before the engine takes the parameters.
    """
    for router in routing.routers(model):
        made = extend(router)
        if made.noise is None:
            _add_noise(made, like=_weight(made))


def add_bias(model: nn.Module) -> None:
    """Give every router a selection bias, of zeros where it has none (arXiv 2408.15664): fp32, no parameter.

    It is added to the logits to choose the experts, in evaluation too; their weights are those of the logits alone.
    Call it before the engine takes the parameters, whose shapes it reads.
    """
    for router in routing.routers(model):
        made = extend(router)
        if made.selection_bias is None:
            _add_bias(made, like=_weight(made))


def biases(model: nn.Module) -> list[list[float]]:
    """The selection biases [sparse layers][experts], exactly, as JSON holds them; [] if there are none."""
    biases_LE: list[Any] = [getattr(router, "selection_bias", None) for router in routing.routers(model)]
    return [bias_E.tolist() for bias_E in biases_LE if bias_E is not None]


def set_biases(model: nn.Module, values: list[list[float]]) -> None:
    """Set what `biases` gave. Raises ValueError if the model has other biases than these."""
    all_LE: list[Any] = [getattr(router, "selection_bias", None) for router in routing.routers(model)]
    made = [bias_E for bias_E in all_LE if bias_E is not None]
    if (given := [len(each) for each in values]) != (have := [len(bias_E) for bias_E in made]):
        raise ValueError(f"selection biases of {given} experts a layer for a model that has {have}")
    for bias_E, value in zip(made, values, strict=True):
        bias_E.copy_(torch.tensor(value))


def _weight(router: TrainingRouter) -> torch.Tensor:
    """The first weight that reads the tokens, [E, D]."""
    return router.weight if router.gate is None else router.gate[0].weight  # type: ignore[index]


def _add_noise(router: TrainingRouter, *, like: torch.Tensor) -> nn.Linear:
    experts, hidden = like.shape
    noise = nn.Linear(hidden, experts, bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(noise.weight)
    router.noise = noise
    return noise


def _add_bias(router: TrainingRouter, *, like: torch.Tensor) -> torch.Tensor:
    bias_E = torch.zeros(len(like), dtype=torch.float32, device=like.device)
    router.selection_bias = bias_E
    return bias_E


def _matches(name: str, what: str) -> bool:
    match = _NAME.fullmatch(name)
    return bool(match and match[2] == what)


def _take(tensors: dict[str, torch.Tensor], source: Path | str) -> dict[int, Gate]:
    """Pop the gates' tensors. Raises ValueError if a gate lacks one."""
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    for name in list(tensors):
        if match := _NAME.fullmatch(name):
            by_layer.setdefault(int(match[1]), {})[match[2]] = tensors.pop(name)
    gates = {}
    for layer, parts in sorted(by_layer.items()):
        for name in () if "linear.weight" in parts else ("gate.0.weight", "gate.2.weight"):
            if name not in parts:
                raise ValueError(f"{source}: layers.{layer}.{name} is missing; write the file again")
        gates[layer] = Gate(**{_FIELDS[name]: value for name, value in parts.items()})
    return gates
