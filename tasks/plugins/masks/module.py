"""Masks as a module of the model that is trained, with the Lagrange multipliers that lead them to a shape.

    masks = install(model, {"num_hidden_layers": 4, "intermediate_size": 512}, ramp=100)
    masks.begin(step)          # before each step
    masks.lagrangian           # after each forward pass of the model: a term of the loss

Each kind of unit that the shape cuts has logits: layers [L], groups of heads [L, K], neurons [L, N], hidden [D]. With
s the expected share of a kind that is cut, in each layer, and t the share that is to be,

    lagrangian = sum over kinds of mean over layers of  a (s - t) + b (s - t)^2

which logits and weights make small, and the multipliers a, b large (arXiv 2310.06694, eq. 2 and 3). a begins at 0, b
at PENALTY and grows. t grows from 0 over the first `ramp` steps. A group of heads has one head of keys and values and
the queries that read it, so that the shape is one that grouped-query attention can have.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks.plugins.masks import hard_concrete, masked
from tasks.plugins.masks.masked import Keep

FILE = "masks.safetensors"
UNITS = {
    "num_hidden_layers": "layer_L",
    "num_key_value_heads": "group_LK",
    "intermediate_size": "neuron_LN",
    "hidden_size": "hidden_D",
}
"""Config fields of a shape, and the mask of each."""
PENALTY, GROWTH, PACE = 10.0, 100.0, 0.2
"""Where b begins, by how much it grows until the last step, and how far a multiplier moves while a logit moves by 1.
With 0, 1 and 1, as in the paper's code, masks swing around their targets for hundreds of steps. With a large b at once
they come there before the loss can say which units to keep."""
_RAMP = 5
"""A run has so many times the steps over which its targets grow, as the paper's have."""
_PREFIX = "masks."
_START = 0.01  # deviation of the logits from their upper limit


class Masks(nn.Module):
    """The logits of every unit that may be cut, and the multipliers of each kind."""

    optimizer_part = "masks"

    def __init__(self, sizes: Mapping[str, int], shape: Mapping[str, int], *, ramp: int) -> None:
        """Args:
        sizes: of the model, by the fields of UNITS.
        shape: of the model that is to be; a field that is missing or equal cuts nothing.
        ramp: steps over which the targets grow.
        """
        super().__init__()
        self.targets = {
            UNITS[field]: 1 - shape[field] / sizes[field]
            for field in UNITS
            if shape.get(field, sizes[field]) < sizes[field]
        }
        layers = sizes["num_hidden_layers"]
        dims = {UNITS[field]: [layers, size] for field, size in sizes.items()}
        dims |= {"layer_L": [layers], "hidden_D": [sizes["hidden_size"]]}
        for name in self.targets:
            start = torch.randn(dims[name]) * _START + hard_concrete.LARGEST
            self.register_parameter(name, nn.Parameter(start))
        self.multipliers = nn.Parameter(torch.zeros(len(self.targets), 2))
        self.ramp, self.progress, self.penalty = ramp, 0.0, PENALTY
        self.keep, self.lagrangian = Keep(), torch.zeros(())

    def begin(self, step: int) -> None:
        """Move the targets, and the penalty on missing them, to where they are in optimizer step `step`, from 1."""
        self.progress = min(1.0, step / self.ramp)
        self.penalty = PENALTY * GROWTH ** min(1.0, step / (_RAMP * self.ramp))

    def draw(self) -> None:
        """Set `keep` and `lagrangian`: in training a sample; else what would be kept at the targets of the moment."""
        lagrangian, *drawn = self()
        self.keep, self.lagrangian = Keep(**dict(zip(self.targets, drawn, strict=True))), lagrangian

    def forward(self) -> tuple[Tensor, ...]:
        """The Lagrangian, and the masks in the order of `targets`, float32."""
        logits = {name: hard_concrete.bounded(getattr(self, name).float()) for name in self.targets}
        terms = [self._term(i, name, logits[name]) for i, name in enumerate(self.targets)]
        if self.training:
            drawn = [hard_concrete.sample(logit) for logit in logits.values()]
        else:
            drawn = [
                chosen(logit, _count(logit, cut=self.progress * self.targets[name])) for name, logit in logits.items()
            ]
        return torch.stack(terms).sum(), *drawn

    def _term(self, number: int, name: str, logits: Tensor) -> Tensor:
        excess_L = hard_concrete.absent(logits).mean(-1) - self.progress * self.targets[name]
        moved = self.multipliers[number].float()
        linear, square = PACE * (2 * moved.detach() - moved)  # the value, and the negative of the gradient
        square = self.penalty + square
        term: Tensor = (linear * excess_L + square * excess_L.square()).mean()
        return term


def install(model: Any, shape: Mapping[str, int], *, ramp: int) -> Masks:
    """Give a dense model masks, as `model.masks`, in its dtype and on its device; it runs masked from now on."""
    masks = Masks({field: getattr(model.config, field) for field in UNITS}, shape, ramp=ramp)
    model.masks = masks.to(model.device, model.dtype)
    masked.attach(model, lambda: masks.keep)
    model.base_model.register_forward_pre_hook(lambda *_: masks.draw())
    return masks


def ramp(steps: int) -> int:
    """The steps of a run over which its targets grow."""
    return max(1, steps // _RAMP)


def of(model: nn.Module) -> Masks | None:
    """The masks that `install` gave a model."""
    return next((child for child in model.children() if isinstance(child, Masks)), None)


def take_out(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the logits out of the weights of a masked model, by the names of Keep; its multipliers are dropped."""
    taken = {name.removeprefix(_PREFIX): weights.pop(name) for name in list(weights) if name.startswith(_PREFIX)}
    taken.pop("multipliers", None)
    return taken


def write(folder: Path, logits: Mapping[str, Tensor]) -> None:
    """Write the logits into a checkpoint folder."""
    save_file({name: value.float().contiguous() for name, value in logits.items()}, folder / FILE)
    (folder / FILE).chmod(0o644)  # safetensors writes 0600


def read(folder: Path) -> dict[str, Tensor]:
    """The logits beside a checkpoint, float32 within their limits."""
    return {
        name: value.clamp(hard_concrete.SMALLEST, hard_concrete.LARGEST)
        for name, value in sorted(load_file(folder / FILE).items())
    }


def chosen(logits: Tensor, count: int) -> Tensor:
    """Factors of the `count` units with the largest logits, the first among equals, and 0 for the others.

    Along the last dimension: in each layer where a unit belongs to a layer.
    """
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(logits).scatter(
        -1, order[..., :count], hard_concrete.factor(logits.gather(-1, order[..., :count]))
    )


def _count(logits: Tensor, *, cut: float) -> int:
    return logits.shape[-1] - round(logits.shape[-1] * cut)
