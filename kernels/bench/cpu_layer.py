"""One experts layer on CPU against its peers and its floors, after a check against the reference.

    OMP_NUM_THREADS=1 python kernels/bench/cpu_layer.py
    OMP_NUM_THREADS=2 python kernels/bench/cpu_layer.py --dtype float32 --shape 1024,16,4,512,344
    OMP_NUM_THREADS=1 python kernels/bench/cpu_layer.py --crossover

Rows are interleaved in one run and the best of several is kept: read the ratios, the milliseconds belong to a shared
machine. Ratios are time / time of ``moe_kernels``, so above 1 means slower than this package.

Shapes: T tokens, D hidden, F intermediate width of one expert, G = 2F, E experts, K top-k, M = T*K routed rows.
"""

import argparse
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moe_kernels import choose_regime, experts_layer, experts_reference, experts_torch

# T, E, K, D, F
SHAPES = {
    "wide": (1024, 16, 4, 512, 344),
    "SmolLM2-135M, 96 experts": (1024, 96, 32, 576, 12),
    "SmolLM2-135M, 48 experts": (1024, 48, 16, 576, 24),
    "Mixtral-tiny": (1024, 8, 2, 256, 704),
}
CROSSOVER = (
    (1024, 192, 64, 576, 8),
    (1024, 96, 32, 576, 12),
    (1024, 96, 16, 576, 12),
    (1024, 96, 12, 576, 12),
    (1024, 64, 16, 192, 12),
    (1024, 64, 16, 2048, 12),
    (1024, 48, 16, 576, 24),
    (1024, 48, 12, 576, 32),
    (1024, 64, 8, 576, 24),
    (1024, 24, 8, 576, 48),
    (1024, 16, 8, 576, 96),
    (1024, 8, 6, 576, 192),
    (1024, 16, 4, 512, 344),
)
Step = Callable[[], Tensor]


class Experts(nn.Module):
    """The module that transformers' implementations expect."""

    def __init__(self, experts: int, hidden: int, width: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias, self.is_transposed = experts, True, False, False
        self.has_post_expert_norm = self._is_expert_parallel = False
        self.gate_up_proj = nn.Parameter((torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(dtype))
        self.down_proj = nn.Parameter((torch.randn(experts, hidden, width) / width**0.5).to(dtype))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def best_ms(steps: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """The best wall time of each step in ms; the steps take turns, so that a busy neighbour slows all alike."""
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first turn warms up
                best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def gemm_floor(rows: list[int], hidden: int, width: int, *, dtype: torch.dtype) -> tuple[Step, Step]:
    """Only the GEMMs of the sorted algorithm, same rows an expert, into buffers that exist: (fwd, fwd+bwd)."""
    w13, w2 = torch.randn(2 * width, hidden).to(dtype), torch.randn(hidden, width).to(dtype)
    most = max(rows)
    x, h, a = (torch.randn(most, size).to(dtype) for size in (hidden, 2 * width, width))
    out = torch.empty(most, hidden, dtype=dtype)
    grad_w13, grad_w2 = torch.empty_like(w13), torch.empty_like(w2)

    def forward() -> Tensor:
        for c in rows:
            torch.mm(x[:c], w13.t(), out=h[:c])
            torch.mm(a[:c], w2.t(), out=out[:c])
        return out

    def both() -> Tensor:
        forward()
        for c in rows:
            torch.mm(x[:c], w2, out=a[:c])
            torch.mm(x[:c].t(), a[:c], out=grad_w2)
            torch.mm(h[:c], w13, out=out[:c])
            torch.mm(h[:c].t(), x[:c], out=grad_w13)
        return out

    return forward, both


def problem(shape: tuple[int, ...], *, dtype: torch.dtype) -> SimpleNamespace:
    tokens, experts, top_k, hidden, width = shape
    torch.manual_seed(0)
    return SimpleNamespace(
        module=Experts(experts, hidden, width, dtype=dtype),
        x=torch.randn(tokens, hidden).to(dtype).requires_grad_(),
        index=torch.rand(tokens, experts).topk(top_k).indices,
        weights=torch.rand(tokens, top_k).softmax(-1).to(dtype).requires_grad_(),
        grad_out=torch.randn(tokens, hidden).to(dtype),
    )


def check(p: SimpleNamespace, outputs: dict[str, Step]) -> dict[str, Step]:
    """The steps that can run this shape; refuses to time anything that disagrees with the fp64 reference."""
    able = {}
    x, w13, w2 = (t.detach().double() for t in (p.x, p.module.gate_up_proj, p.module.down_proj))
    expected = experts_reference(x, w13, w2, p.index, p.weights.detach().double())
    for name, step in outputs.items():
        try:
            out = step()
        except RuntimeError as reason:
            print(f"{name} cannot run this shape: {reason}")
            continue
        error = ((out.double() - expected).norm() / expected.norm()).item()
        limit = 2e-2 if p.x.dtype.itemsize <= 2 else 1e-5
        if not error <= limit:
            raise SystemExit(f"{name} disagrees with the reference: relative error {error:.1e}, limit {limit:.0e}")
        able[name] = step
    return able


def bench(name: str, shape: tuple[int, ...], *, dtype: torch.dtype, repeats: int) -> None:
    from transformers.integrations.moe import grouped_mm_experts_forward
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    tokens, experts, top_k, hidden, width = shape
    p = problem(shape, dtype=dtype)
    w13, w2 = p.module.gate_up_proj, p.module.down_proj
    eager_forward = inspect.unwrap(MixtralExperts.forward)  # past the dispatch on experts_implementation
    sparse: dict[str, Step] = {
        "moe_kernels": lambda: experts_layer(p.x, w13, w2, p.index, p.weights),
        "transformers grouped_mm": lambda: grouped_mm_experts_forward(p.module, p.x, p.index, p.weights),
        "transformers eager": lambda: eager_forward(p.module, p.x, p.index, p.weights),
    }
    print(f"\n{name}: T={tokens} E={experts} K={top_k} D={hidden} F={width} {dtype}")
    sparse = check(p, sparse)
    dense13 = torch.randn(2 * top_k * width, hidden).mul_(hidden**-0.5).to(dtype).requires_grad_()
    dense2 = torch.randn(hidden, top_k * width).mul_(hidden**-0.5).to(dtype).requires_grad_()

    def dense() -> Tensor:
        gate, up = F.linear(p.x, dense13).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, dense2)

    def with_backward(step: Step, leaves: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(step(), leaves, p.grad_out)

    rows = [c for c in p.index.flatten().bincount().tolist() if c]
    active = gemm_floor(rows, hidden, width, dtype=dtype)
    every = gemm_floor([tokens], hidden, experts * width, dtype=dtype)
    leaves = [p.x, w13, w2, p.weights]
    forward: dict[str, Callable[[], object]] = dict(sparse)
    both: dict[str, Callable[[], object]] = {key: with_backward(step, leaves) for key, step in sparse.items()}
    forward |= {"dense MLP, same active FLOPs": dense, "bare GEMMs, rows of each expert": active[0]}
    forward |= {"bare GEMMs, all experts at once": every[0]}
    both |= {"dense MLP, same active FLOPs": with_backward(dense, [p.x, dense13, dense2])}
    both |= {"bare GEMMs, rows of each expert": active[1], "bare GEMMs, all experts at once": every[1]}
    with torch.no_grad():
        forward_ms = best_ms(forward, repeats=repeats)
    both_ms = best_ms(both, repeats=repeats)

    regime = choose_regime(experts, top_k, width=width, tokens=tokens, dtype=dtype)
    print(f"{'regime ' + regime:34}{'fwd ms':>9}{'ratio':>8}{'fwd+bwd ms':>12}{'ratio':>8}")
    for key in forward:
        ratios = forward_ms[key] / forward_ms["moe_kernels"], both_ms[key] / both_ms["moe_kernels"]
        print(f"{key:34}{forward_ms[key]:9.1f}{ratios[0]:8.2f}{both_ms[key]:12.1f}{ratios[1]:8.2f}", flush=True)


def crossover(*, dtype: torch.dtype, repeats: int) -> None:
    """The table behind ``choose_regime``: both regimes on each shape, forward + backward."""
    print(f"{dtype}\n| T, E, K, D, F | E/K*F | sorted ms | dense ms | dense/sorted | chosen |")
    print("|---|---|---|---|---|---|")
    for shape in CROSSOVER:
        tokens, experts, top_k, _, width = shape
        p = problem(shape, dtype=dtype)
        leaves = [p.x, p.module.gate_up_proj, p.module.down_proj, p.weights]
        steps: dict[str, Callable[[], object]] = {}
        for regime in ("sorted", "dense"):

            def step(regime: str = regime, p: SimpleNamespace = p, leaves: list[Tensor] = leaves) -> object:
                out = experts_torch(leaves[0], leaves[1], leaves[2], p.index, p.weights, regime=regime)  # type: ignore[arg-type]
                return torch.autograd.grad(out, leaves, p.grad_out)

            steps[regime] = step
        ms = best_ms(steps, repeats=repeats)
        chosen = choose_regime(experts, top_k, width=width, tokens=tokens, dtype=dtype)
        cells = [", ".join(map(str, shape)), f"{experts * width / top_k:.0f}", f"{ms['sorted']:.1f}"]
        cells += [f"{ms['dense']:.1f}", f"{ms['dense'] / ms['sorted']:.2f}", chosen]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="T,E,K,D,F; by default the four of the table in docs/kernels.md")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--crossover", action="store_true", help="compare the two regimes instead")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio = time / time of moe_kernels")
    if args.crossover:
        crossover(dtype=dtype, repeats=args.repeats)
        return
    shapes = SHAPES if args.shape is None else {"custom": tuple(map(int, args.shape.split(",")))}
    for name, shape in shapes.items():
        bench(name, shape, dtype=dtype, repeats=args.repeats)


if __name__ == "__main__":
    main()
