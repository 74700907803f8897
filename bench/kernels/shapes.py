"""The layers that are measured, and one problem of each: weights, tokens, routing.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F, E experts, K top-k, M = T*K routed rows.
"""

import argparse
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

RoutingName = Literal["uniform", "zipf"]
ROUTINGS = get_args(RoutingName)
ZIPF_EXPONENT = 1.5


@dataclass(frozen=True)
class Shape:
    """One experts layer and how many tokens it sees."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    width: int
    name: str = ""

    @property
    def rows(self) -> int:
        """M."""
        return self.tokens * self.top_k

    @property
    def rows_per_expert(self) -> float:
        return self.rows / self.experts

    def __str__(self) -> str:
        sizes = f"T={self.tokens} E={self.experts} K={self.top_k} D={self.hidden} F={self.width}"
        return f"{self.name}: {sizes}" if self.name else sizes


# E, K, D, F. The last seven are dense models cut into experts.
LAYERS = {
    "llama-moe-3.5b-4of16": (16, 4, 4096, 688),
    "llama-moe-3.0b-2of16": (16, 2, 4096, 688),
    "llama-moe-3.5b-2of8": (8, 2, 4096, 1376),
    "olmoe-1b-7b": (64, 8, 2048, 1024),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "granite-3b-a800m": (40, 8, 1536, 512),
    "sonic-7b": (128, 8, 1536, 256),
    "sonic-30b": (256, 16, 4096, 256),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "llama-3-8b-4of16": (16, 4, 4096, 896),
    "llama-3-8b-2of8": (8, 2, 4096, 1792),
    "llama-3.2-1b-4of16": (16, 4, 2048, 512),
    "llama-3.2-1b-2of8": (8, 2, 2048, 1024),
    "tinyllama-4of16": (16, 4, 2048, 352),
    "tinyllama-2of8": (8, 2, 2048, 704),
    "smollm2-135m-16of48": (48, 16, 576, 24),
}
ALL = [f"{layer}@{tokens}" for tokens in (1024, 8192, 32768) for layer in LAYERS]
# The most wanted first: what does not fit into the time is at the end.
DEFAULT = [
    "llama-moe-3.5b-4of16@32768",
    "qwen3-30b-a3b@32768",
    "qwen3-30b-a3b@8192",
    "llama-moe-3.5b-4of16@8192",
    "llama-moe-3.5b-2of8@8192",
    "olmoe-1b-7b@8192",
    "mixtral-8x7b@8192",
    "tinyllama-4of16@8192",
    "qwen3-30b-a3b@1024",
    "llama-moe-3.5b-4of16@32",
]
SMALL = ["96,4,2,64,48", "64,8,3,48,40"]  # what a CPU, and Triton's interpreter, does in a moment


def parse_shape(text: str) -> Shape:
    """``NAME@T`` with a name of :data:`LAYERS`, or ``T,E,K,D,F``.

    Raises:
        ArgumentTypeError: neither of the two.
    """
    layer, at, tokens = text.partition("@")
    try:
        sizes: tuple[int, ...]
        if at and layer in LAYERS:
            sizes = (int(tokens), *LAYERS[layer])
        else:
            layer, sizes = "", tuple(map(int, text.split(",")))
        count, experts, top_k, hidden, width = sizes
    except ValueError:
        fix = f"write T,E,K,D,F or NAME@T, NAME one of {', '.join(LAYERS)}"
        raise argparse.ArgumentTypeError(f"{text!r}: {fix}") from None
    if min(sizes) < 1 or top_k > experts:
        raise argparse.ArgumentTypeError(f"{text!r}: every size is at least 1 and K at most E")
    return Shape(count, experts, top_k, hidden, width, layer)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What every side computes. x, w13, w2 and the routing weights want gradients."""

    shape: Shape
    x_TD: Tensor
    w13_EGD: nn.Parameter
    w2_EDF: nn.Parameter
    index_TK: Tensor
    weights_TK: Tensor
    grad_out_TD: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x_TD, self.w13_EGD, self.w2_EDF, self.weights_TK]


def draw_experts(shape: Shape, routing: RoutingName, *, generator: torch.Generator) -> Tensor:
    """(T, K) distinct experts a token, int64.

    ``zipf`` draws without replacement with odds ``rank ** -1.5`` (the K largest of Gumbel noise added to the
    log-odds; Efraimidis and Spirakis 2006), so that the most popular expert is chosen by nearly every token.
    """
    noise_TE = torch.rand(shape.tokens, shape.experts, generator=generator, device=generator.device)
    if routing == "zipf":
        rank_E = torch.arange(1, shape.experts + 1, device=generator.device)
        noise_TE = -(-noise_TE.log()).log() - ZIPF_EXPONENT * rank_E.log()
    return noise_TE.topk(shape.top_k).indices


def make_problem(shape: Shape, routing: RoutingName, *, dtype: torch.dtype, device: str) -> Problem:
    """The same numbers on every call: outputs and gradients are of order one, the upstream gradient is random."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype).mul_(scale)

    index_TK = draw_experts(shape, routing, generator=generator)
    logits_TK = torch.randn(index_TK.shape, generator=generator, device=device)
    experts, hidden, width = shape.experts, shape.hidden, shape.width
    return Problem(
        shape=shape,
        x_TD=normal(shape.tokens, hidden).requires_grad_(),
        w13_EGD=nn.Parameter(normal(experts, 2 * width, hidden, scale=hidden**-0.5)),
        w2_EDF=nn.Parameter(normal(experts, hidden, width, scale=width**-0.5)),
        index_TK=index_TK,
        weights_TK=logits_TK.softmax(-1).to(dtype).requires_grad_(),
        grad_out_TD=normal(shape.tokens, hidden),
    )
