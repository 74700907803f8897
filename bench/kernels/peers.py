"""Who is measured: adapters from one problem to each implementation's own calling convention.

An adapter is called on a :class:`~.shapes.Problem` and gives a :class:`Side`. It raises :class:`Unfit` where the
implementation cannot run this problem; whatever else it raises is reported by name and stops nothing.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M = T*K routed rows.
"""

import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kernels.shapes import Problem

BATCHED_BYTES = 4 * 2**30  # of gathered weights, at which transformers' batched_mm is no longer tried
OURS = "moe_kernels"


class Unfit(Exception):
    """An implementation cannot run a problem; says why."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One implementation, bound to a problem.

    ``backward(out)`` gives the gradients of x, w13, w2 and the routing weights, once for each ``out``.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An implementation that may be installed.

    ``module`` is what it is imported from, ``package`` its name where that differs, and ``install`` how to get it. A
    ``bound`` computes something easier than the layer: it is timed and never compared.
    """

    name: str
    build: Callable[[Problem], Side]
    module: str | None = None
    package: str = ""
    install: str = ""
    bound: bool = False

    def missing(self) -> str | None:
        """A line for the user, or None where the implementation can be imported."""
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.name} is not installed: {self.install}"

    def version(self) -> str | None:
        """Of the installed package; None for what is part of this benchmark, or imported from a bare folder."""
        try:
            return importlib.metadata.version(self.package or self.module or "")
        except (importlib.metadata.PackageNotFoundError, ValueError):
            return None


def by_autograd(layer: Callable[[], Tensor], leaves: Sequence[Tensor], grad_out: Tensor) -> Side:
    return Side(forward=layer, backward=lambda out: torch.autograd.grad(out, leaves, grad_out))


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _needs_cuda(p: Problem, *, interpretable: bool) -> None:
    if not p.x_TD.is_cuda and not (interpretable and interpreted()):
        raise Unfit("it needs a GPU" + (", or TRITON_INTERPRET=1" if interpretable else ""))


def ours(p: Problem, *, path: Literal["triton", "sorted"] | None = None) -> Side:
    """``sorted`` is one cuBLAS call an expert and product: what few wide experts might rather use."""
    from moe_kernels import experts_layer

    if path is None and interpreted() and not p.x_TD.is_cuda:
        path = "triton"
    x, w13, w2, weights = p.leaves
    return by_autograd(lambda: experts_layer(x, w13, w2, p.index_TK, weights, path=path), p.leaves, p.grad_out_TD)


class Experts(nn.Module):
    """What transformers' implementations read off an experts module."""

    def __init__(self, p: Problem) -> None:
        super().__init__()
        self.num_experts, self.gate_up_proj, self.down_proj = p.shape.experts, p.w13_EGD, p.w2_EDF
        self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = True, False, False, True
        self.has_post_expert_norm = self._is_expert_parallel = False
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gated: Tensor = self.act_fn(gate) * up
        return gated


def _transformers(p: Problem, forward: Callable[..., Tensor]) -> Side:
    module = Experts(p)
    return by_autograd(lambda: forward(module, p.x_TD, p.index_TK, p.weights_TK), p.leaves, p.grad_out_TD)


def eager(p: Problem) -> Side:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return _transformers(p, inspect.unwrap(MixtralExperts.forward))  # past the dispatch on experts_implementation


def grouped_mm(p: Problem) -> Side:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return _transformers(p, grouped_mm_experts_forward)


def batched_mm(p: Problem) -> Side:
    from transformers.integrations.moe import batched_mm_experts_forward

    gathered = 3 * p.shape.rows * p.shape.hidden * p.shape.width * p.x_TD.dtype.itemsize
    if gathered > BATCHED_BYTES:
        raise Unfit(f"it would gather {gathered / 2**30:.0f} GiB of weights")
    return _transformers(p, batched_mm_experts_forward)


def scattermoe(p: Problem) -> Side:
    _needs_cuda(p, interpretable=True)
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def layer() -> Tensor:
        order = flatten_sort_count(p.index_TK, num_experts=p.shape.experts)
        hidden_MG = parallel_linear(p.x_TD, p.w13_EGD.permute(0, 2, 1), p.shape.top_k, *order, grouped_out=True)
        gate_MF, up_MF = hidden_MG.chunk(2, dim=-1)
        act_MF, w2_EFD = F.silu(gate_MF) * up_MF, p.w2_EDF.permute(0, 2, 1)
        out_TD: Tensor = parallel_linear(act_MF, w2_EFD, 1, *order, grouped_in=True, gates=p.weights_TK)
        return out_TD

    return by_autograd(layer, p.leaves, p.grad_out_TD)


def liger(p: Problem) -> Side:
    _needs_cuda(p, interpretable=True)
    from liger_kernel.ops import LigerFusedMoEFunction

    x, w13, w2, weights = p.leaves
    index_TK = p.index_TK.int()
    return by_autograd(lambda: LigerFusedMoEFunction.apply(x, w13, w2, index_TK, weights), p.leaves, p.grad_out_TD)


def sonicmoe(p: Problem) -> Side:
    _needs_cuda(p, interpretable=False)
    if torch.cuda.get_device_capability()[0] < 9:
        raise Unfit("it needs Hopper or newer")
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    tokens, top_k = p.index_TK.shape
    token_M = torch.arange(tokens, device=p.x_TD.device, dtype=torch.int32).repeat_interleave(top_k)
    expert_M = p.index_TK.flatten().int()

    def layer() -> Tensor:
        out_TD: Tensor
        out_TD, _ = moe_general_routing_inputs(
            p.x_TD,
            p.weights_TK.flatten(),
            token_M,
            expert_M,
            p.w13_EGD.permute(1, 2, 0),
            None,
            p.w2_EDF.permute(1, 2, 0),
            None,
            E=p.shape.experts,
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
        )
        return out_TD

    return by_autograd(layer, p.leaves, p.grad_out_TD)


def dense(p: Problem) -> Side:
    """A dense SwiGLU of width K*F: the same FLOPs with nothing to route."""
    shape = p.shape
    wide = shape.top_k * shape.width
    w13 = torch.randn(2 * wide, shape.hidden, device=p.x_TD.device, dtype=p.x_TD.dtype).mul_(shape.hidden**-0.5)
    w2 = torch.randn(shape.hidden, wide, device=p.x_TD.device, dtype=p.x_TD.dtype).mul_(wide**-0.5)
    w13.requires_grad_(), w2.requires_grad_()

    def layer() -> Tensor:
        gate, up = F.linear(p.x_TD, w13).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, w2)

    return by_autograd(layer, [p.x_TD, w13, w2], p.grad_out_TD)


def balanced_gemms(p: Problem) -> Side:
    """Only the GEMMs, M/E rows for every expert, gathered beforehand, into buffers that exist."""
    shape = p.shape
    count = -(-shape.rows // shape.experts)
    w13_EGD, w2_EDF = p.w13_EGD.detach(), p.w2_EDF.detach()
    x, hidden, act, y = (
        torch.randn(shape.experts, count, size, device=w2_EDF.device, dtype=w2_EDF.dtype)
        for size in (shape.hidden, 2 * shape.width, shape.width, shape.hidden)
    )
    grad_w13, grad_w2 = torch.empty_like(w13_EGD), torch.empty_like(w2_EDF)

    def forward() -> Tensor:
        torch.bmm(x, w13_EGD.mT, out=hidden)
        return torch.bmm(act, w2_EDF.mT, out=y)

    def backward(out: Tensor) -> Sequence[Tensor]:
        torch.bmm(x, w2_EDF, out=act)
        torch.bmm(x.mT, act, out=grad_w2)
        torch.bmm(hidden, w13_EGD, out=y)
        torch.bmm(hidden.mT, x, out=grad_w13)
        return []

    return Side(forward=forward, backward=backward)


def all_peers() -> list[Peer]:
    """Ours first, then the others by how long their first call takes.

    Liger tries its 240 tiles at every (D, F), minutes each, only where its own switch is set.
    """
    tuned = os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0") != "0"  # read when liger_kernel is imported

    def of_transformers(name: str, build: Callable[[Problem], Side]) -> Peer:
        install = "pip install 'transformers>=5'"
        return Peer(name=f"transformers {name}", build=build, module="transformers", install=install)

    return [
        Peer(name=OURS, build=ours),
        Peer(name=f"{OURS}, path sorted", build=partial(ours, path="sorted")),
        Peer(name="dense SwiGLU, same FLOPs", build=dense, bound=True),
        Peer(name="cuBLAS bmm, balanced", build=balanced_gemms, bound=True),
        of_transformers("grouped_mm", grouped_mm),
        of_transformers("batched_mm", batched_mm),
        Peer(
            name="ScatterMoE",
            build=scattermoe,
            module="scattermoe",
            install="pip install git+https://github.com/shawntan/scattermoe",
        ),
        Peer(
            name="SonicMoE",
            build=sonicmoe,
            module="sonicmoe",
            package="sonic-moe",
            install="pip install sonic-moe (Python 3.12 or newer, Hopper or newer, torch 2.9 at most)",
        ),
        Peer(
            name="Liger, autotuned" if tuned else "Liger, one tile",
            build=liger,
            module="liger_kernel",
            install="pip install liger-kernel",
        ),
        of_transformers("eager", eager),
    ]
