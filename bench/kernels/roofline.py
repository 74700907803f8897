"""What a perfect layer would take on a card: FLOPs, bytes and the floors that follow.

The floor takes forward and backward each as one block, ``max(F/P, B/BW)``, as published fractions do.

Counted: x and grad_out gathered on load, hidden and activations stored, every expert's weights read once and every
weight gradient written once, perfect cache inside a kernel. The router is not part of the layer.

Shapes: T tokens, D hidden, F width of one expert, E experts, M = T*K routed rows.
"""

from dataclasses import dataclass
from typing import Literal

from bench.kernels.shapes import Shape

Pass = Literal["forward", "backward"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A device's dense peak in half precision with fp32 sums, FLOP/s, and its memory bandwidth, B/s."""

    peak: float
    bandwidth: float


# By the name that the driver gives. Vendors' data sheets; sustained clocks are lower.
CARDS = {
    "NVIDIA H100 80GB HBM3": Card(peak=989.4e12, bandwidth=3.35e12),
    "NVIDIA H200": Card(peak=989.4e12, bandwidth=4.8e12),
    "NVIDIA A100-SXM4-80GB": Card(peak=312e12, bandwidth=2.0e12),
    "NVIDIA B200": Card(peak=2250e12, bandwidth=8e12),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Least FLOPs and bytes of one kernel."""

    kernel: str
    of: Pass
    flops: int
    bytes: int


def work(shape: Shape, *, itemsize: int = 2, keep_hidden: bool = True) -> list[Work]:
    """Every kernel of one forward and backward; without ``keep_hidden`` as inference, which stores no hidden."""
    tokens, rows = shape.tokens * shape.hidden, shape.rows * shape.hidden  # elements of (T, D) and (M, D)
    wide, weight = shape.rows * shape.width, shape.experts * shape.hidden * shape.width  # of (M, F) and (E, D, F)
    gemm = 2 * shape.rows * shape.hidden * shape.width
    hidden = 2 * wide if keep_hidden else 0
    table: list[tuple[str, Pass, int, int]] = [
        ("up", "forward", 2 * gemm, tokens + 2 * weight + hidden + wide),
        ("down", "forward", gemm, wide + weight + rows),
        ("combine", "forward", 0, rows + tokens),
        ("down_backward", "backward", gemm, tokens + weight + 5 * wide),
        ("w2_gradient", "backward", gemm, tokens + wide + weight),
        ("x_gradient", "backward", 2 * gemm, 2 * wide + 2 * weight + rows),
        ("combine_backward", "backward", 0, rows + tokens),
        ("w13_gradient", "backward", 2 * gemm, tokens + 2 * wide + 2 * weight),
    ]
    return [Work(kernel=name, of=of, flops=flops, bytes=itemsize * count) for name, of, flops, count in table]


def pass_floor(shape: Shape, card: Card) -> dict[str, float]:
    """ms of ``forward``, ``backward``, ``full`` (their sum) and ``inference``, each pass as one block."""
    every = work(shape)
    passes = {
        "forward": [item for item in every if item.of == "forward"],
        "backward": [item for item in every if item.of == "backward"],
        "inference": [item for item in work(shape, keep_hidden=False) if item.of == "forward"],
    }
    floors = {
        name: 1e3 * max(sum(i.flops for i in items) / card.peak, sum(i.bytes for i in items) / card.bandwidth)
        for name, items in passes.items()
    }
    return floors | {"full": floors["forward"] + floors["backward"]}


def full_flops(shape: Shape) -> int:
    """18 T K D F."""
    return sum(item.flops for item in work(shape))


def saved_bytes(shape: Shape, *, itemsize: int = 2) -> int:
    """What the layer has to keep from forward to backward: x, hidden, and 12 bytes of indices a routed row."""
    return itemsize * (shape.tokens * shape.hidden + 2 * shape.rows * shape.width) + 12 * shape.rows
