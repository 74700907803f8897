"""Problems and the error standard shared by the kernel tests.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F, E experts, K top-k.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from moe_kernels.reference import experts_reference
from torch import Tensor

Layer = Callable[..., Tensor]
Spread = Literal["uniform", "one expert", "first half"]
INPUTS = ("x_TD", "w13_EGD", "w2_EDF", "top_k_weights_TK")
NAMES = ("out", "dx", "dw13", "dw2", "dweights")


@dataclass(frozen=True, kw_only=True)
class Problem:
    x_TD: Tensor
    w13_EGD: Tensor
    w2_EDF: Tensor
    top_k_index_TK: Tensor
    top_k_weights_TK: Tensor
    grad_out_TD: Tensor

    def run(
        self, layer: Layer, dtype: torch.dtype, *, device: str = "cpu", wanted: Collection[str] = NAMES[1:]
    ) -> dict[str, Tensor]:
        """The output and the gradients, by name, with every floating input cast to ``dtype``; all back on CPU.

        Inputs whose gradient is not wanted do not require one.
        """
        leaves = [
            getattr(self, name).detach().clone().to(device, dtype).requires_grad_(gradient in wanted)
            for name, gradient in zip(INPUTS, NAMES[1:], strict=True)
        ]
        out = layer(leaves[0], leaves[1], leaves[2], self.top_k_index_TK.to(device), leaves[3])
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(out, needed, self.grad_out_TD.to(device, out.dtype)) if needed else ()
        names = [gradient for gradient in NAMES[1:] if gradient in wanted]
        return {"out": out.detach().cpu()} | {n: g.cpu() for n, g in zip(names, grads, strict=True)}

    def rounded(self, dtype: torch.dtype) -> "Problem":
        """The same problem with inputs that ``dtype`` can hold, so that fp64 sees exactly what the kernel sees."""
        cast = {name: tensor.to(dtype) for name, tensor in vars(self).items() if tensor.is_floating_point()}
        return Problem(top_k_index_TK=self.top_k_index_TK, **cast)

    def replaced(self, **tensors: Tensor) -> "Problem":
        """The same problem but for these tensors."""
        return Problem(**vars(self) | tensors)


def make_problem(
    tokens: int, experts: int, *, top_k: int, hidden: int, width: int, spread: Spread = "uniform", seed: int = 0
) -> Problem:
    """Random inputs; routing weights do not sum to one, and the upstream gradient is random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    preference_TE = torch.rand(tokens, experts, generator=generator)
    if spread == "one expert":
        preference_TE[:, :top_k] += 1
    elif spread == "first half":
        preference_TE[:, : max(experts // 2, top_k)] += 1
    return Problem(
        x_TD=normal(tokens, hidden),
        w13_EGD=normal(experts, 2 * width, hidden) / hidden**0.5,
        w2_EDF=normal(experts, hidden, width) / width**0.5,
        top_k_index_TK=preference_TE.topk(top_k).indices,
        top_k_weights_TK=0.2 + torch.rand(tokens, top_k, generator=generator, dtype=torch.float64),
        grad_out_TD=normal(tokens, hidden),
    )


def relative_error(tensor: Tensor, exact: Tensor) -> float:
    """Of the norms. Inputs are of order one: a result far below 0.1 is a cancellation, whose rounding error belongs to
    its terms, so it is measured against 0.1."""
    scale = exact.double().norm().clamp(min=0.1 * max(exact.numel(), 1) ** 0.5)
    return ((tensor.double() - exact.double()).norm() / scale).item()


def assert_as_accurate_as_torch(
    got: dict[str, Tensor], *, plain: dict[str, Tensor], exact: dict[str, Tensor], slack: float
) -> None:
    """err <= 1.5 * err(plain torch at the same dtype) + slack, for every name in ``got``."""
    for name, tensor in got.items():
        assert tensor.shape == exact[name].shape, name
        error, allowed = relative_error(tensor, exact[name]), 1.5 * relative_error(plain[name], exact[name]) + slack
        assert error <= allowed, f"{name}: error {error:.2e} against fp64, allowed {allowed:.2e}"


def assert_layer_accurate(problem: Problem, layer: Layer, dtype: torch.dtype, *, slack: float, device: str) -> None:
    """The error standard for the output and every gradient of ``layer`` against the fp64 oracle.

    ``slack`` is in units of the dtype's eps; in fp64 plain torch is the yardstick itself, hence 32 times that.
    """
    p = problem.rounded(dtype)
    assert_as_accurate_as_torch(
        p.run(layer, dtype, device=device),
        plain=p.run(experts_reference, dtype),
        exact=p.run(experts_reference, torch.float64),
        slack=torch.finfo(dtype).eps * slack * (32 if dtype is torch.float64 else 1),
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What is allocated but not written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).new_empty(2).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
