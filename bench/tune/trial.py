"""One trial of the tuner: a whole layer with one kernel's tile replaced, compiled only, or run, checked and timed.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M = T*K routed rows sorted by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from moe_kernels import config, sorted_path
from moe_kernels.backward import experts_backward_triton
from moe_kernels.config import KERNELS, Kernel, Tile
from moe_kernels.forward import experts_forward_triton
from moe_kernels.routing import Routing, build_routing
from torch import Tensor

from bench.kernels.shapes import Shape
from bench.tune.compile_only import Launch, recorded_launches
from bench.tune.predict import seconds


class Trial(NamedTuple):
    """What came of a tile: its time, None if it was refused, and what it takes or why it was refused."""

    milliseconds: float | None
    note: str


Measure = Callable[[Kernel, Tile], Trial]


def table_name(launch: Launch) -> str | None:
    """The kernel's name in the table; None for those without tiles."""
    if launch.name == "weight_gradient_kernel":
        return "w2_gradient" if launch.options["GATHER_LEFT"] else "w13_gradient"
    name = launch.name.removesuffix("_kernel")
    return name if name in KERNELS else None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The inputs of one layer."""

    x_TD: Tensor
    w13_EGD: Tensor
    w2_EDF: Tensor
    weights_TK: Tensor
    grad_out_TD: Tensor
    routing: Routing

    @classmethod
    def make(cls, shape: Shape, *, dtype: torch.dtype, device: str) -> "Layer":
        """Random inputs of order one, experts drawn uniformly; on CPU memory that nothing has written."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            empty = torch.empty(size, dtype=dtype, device=device)
            return empty if device == "cpu" else empty.normal_(0, scale, generator=generator)

        preference_TE = torch.rand(shape.tokens, shape.experts, generator=generator, device=device)
        return cls(
            x_TD=normal(shape.tokens, shape.hidden),
            w13_EGD=normal(shape.experts, 2 * shape.width, shape.hidden, scale=shape.hidden**-0.5),
            w2_EDF=normal(shape.experts, shape.hidden, shape.width, scale=shape.width**-0.5),
            weights_TK=torch.rand(shape.tokens, shape.top_k, generator=generator, device=device),
            grad_out_TD=normal(shape.tokens, shape.hidden),
            routing=build_routing(preference_TE.topk(shape.top_k).indices, experts=shape.experts),
        )

    def triton(self) -> list[Tensor]:
        """The output and all gradients."""
        out_TD, hidden_MG = experts_forward_triton(
            self.x_TD,
            self.w13_EGD,
            None,
            self.w2_EDF,
            weights_TK=self.weights_TK,
            routing=self.routing,
            keep_hidden=True,
        )
        return [out_TD, *self._gradients(experts_backward_triton, hidden_MG)]

    def torch(self) -> list[Tensor]:
        """The same by the torch path in fp32, for fp32 inputs in fp64."""
        wide = torch.float64 if self.x_TD.dtype == torch.float32 else torch.float32
        names = ("x_TD", "w13_EGD", "w2_EDF", "grad_out_TD")
        layer = replace(self, **{name: getattr(self, name).to(wide) for name in names})
        out_TD, hidden_MG = sorted_path.forward(
            layer.x_TD, layer.w13_EGD, None, layer.w2_EDF, weights_TK=layer.weights_TK, routing=layer.routing
        )
        return [out_TD, *layer._gradients(sorted_path.backward, hidden_MG)]

    def _gradients(self, backward: Callable[..., tuple[Tensor | None, ...]], hidden_MG: Tensor) -> list[Tensor]:
        grads = backward(
            self.grad_out_TD,
            self.x_TD,
            self.w13_EGD,
            None,
            self.w2_EDF,
            hidden_MG,
            weights_TK=self.weights_TK,
            routing=self.routing,
            need_x=True,
            need_w13=True,
            need_w2=True,
            need_weights=True,
        )
        return [grad for grad in grads if grad is not None]

    def launch(self, kernel: Kernel, tile: Tile, *, run: bool) -> tuple[Launch, list[Tensor]]:
        """Launch of ``kernel`` with ``tile`` in a forward and backward, only compiled unless ``run``, and what these
        computed."""
        with config.forced(kernel, tile), recorded_launches(run=run) as launches:
            computed = self.triton()
        (launch,) = (launch for launch in launches if table_name(launch) == kernel)
        return launch, computed


def predicted(layer: Layer, shape: Shape, *, arch: int) -> Measure:
    """Compiles for ``arch`` and predicts; nothing runs."""

    def measure(kernel: Kernel, tile: Tile) -> Trial:
        launch, _ = layer.launch(kernel, tile, run=False)
        used, itemsize = launch.resources, layer.x_TD.element_size()
        if refusal := used.refusal(arch):
            return Trial(None, refusal)
        time = seconds(kernel, tile, shape, itemsize=itemsize, arch=arch, registers=used.registers, shared=used.shared)
        return Trial(time * 1e3, f"predicted; {used}")

    return measure


def measured(layer: Layer, *, arch: int, timer: Callable[[Launch], float]) -> Measure:
    """Compiles, looks at what that takes, runs, compares with the torch path, and times by ``timer``, in ms."""
    exact = layer.torch()
    tolerance = max(2 * torch.finfo(layer.x_TD.dtype).eps, 1e-5)

    def measure(kernel: Kernel, tile: Tile) -> Trial:
        launch, _ = layer.launch(kernel, tile, run=False)
        used = launch.resources
        if refusal := used.refusal(arch):
            return Trial(None, refusal)
        launch, computed = layer.launch(kernel, tile, run=True)
        for got, right in zip(computed, exact, strict=True):
            error = float((got.to(right.dtype) - right).norm() / right.norm())
            if not error <= tolerance:
                return Trial(None, f"wrong: a relative error of {error:.1e}, allowed {tolerance:.1e}")
        return Trial(timer(launch), str(used))

    return measure
