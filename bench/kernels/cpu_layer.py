"""One experts layer on CPU against its peers and its floors: time, peak memory, bytes kept for backward.

    python -m bench.kernels.cpu_layer --json cpu_layer.json
    python -m bench.kernels.cpu_layer --threads 1 --dtypes float32 --shapes 1024,16,4,512,344
    python -m bench.kernels.cpu_layer --threads 1 --crossover

Sides take turns in one run and the best of several turns is kept. One thread is timed in CPU time, which a busy
neighbour changes least; more threads in wall time, which wants an idle machine. ``x floor`` is time / time of the bare
GEMMs, forward + backward. A side that disagrees with the fp64 reference gets no figure.

glibc gives freed memory back and maps it anew at 2 us a page, which costs a side that allocates 45 MB a call 20 ms.
Put MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 before the command to leave that out; the JSON
file says whether it was so.

The floor is what any implementation must do: the six GEMMs of each expert over slices of sorted buffers, with its own
weights and gradients. The hot floor reuses the weights of one expert, which then stay in cache.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M = T*K rows sorted by expert.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from moe_kernels import choose_regime, experts_layer
from torch import Tensor

from bench import common
from bench.kernels.check import disagreement, reference
from bench.kernels.peers import OURS, Peer, Side, Unfit, batched_mm, by_autograd, dense, eager, grouped_mm, ours
from bench.kernels.shapes import Problem, Shape, make_problem, parse_shape

FLOOR = "bare GEMMs"
FP32_LIMIT = 2e-6  # sums of hundreds of terms round in fp32 itself; half precision sums in fp32
SHAPES = {  # T, E, K, D, F
    "wide": "1024,16,4,512,344",
    "SmolLM2-135M, 96 experts": "1024,96,32,576,12",
    "SmolLM2-135M, 48 experts": "1024,48,16,576,24",
    "Mixtral-tiny": "1024,8,2,256,704",
}
CROSSOVER = (
    "1024,192,64,576,8",
    "1024,96,32,576,12",
    "1024,64,16,192,12",
    "1024,64,16,2048,12",
    "1024,96,16,576,12",
    "1024,48,16,576,24",
    "1024,48,12,576,32",
    "1024,24,8,576,48",
    "1024,24,12,576,48",
    "1024,16,8,576,96",
    "1024,8,6,576,192",
    "1024,8,7,576,192",
)
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
Step = Callable[[], object]
Row = dict[str, Any]


def bare_gemms(p: Problem, *, hot: bool = False) -> Side:
    """Only the GEMMs of the sorted path, rows as routed, into buffers that exist."""
    dtype, shape = p.x_TD.dtype, p.shape
    counts = p.index_TK.flatten().bincount(minlength=shape.experts).tolist()
    w13_EGD, w2_EDF = p.w13_EGD.detach(), p.w2_EDF.detach()
    x, hidden, act, y, grad_x, grad_hidden, grad_act, grad_y = (
        torch.randn(shape.rows, size).to(dtype).split(counts)
        for size in (shape.hidden, 2 * shape.width, shape.width, shape.hidden) * 2
    )
    grad_w13_EGD, grad_w2_EDF = torch.empty_like(w13_EGD), torch.empty_like(w2_EDF)
    weights = list(zip(w13_EGD, w2_EDF, grad_w13_EGD, grad_w2_EDF, strict=True))
    experts = [(e, *weights[0 if hot else e]) for e, count in enumerate(counts) if count]

    def forward() -> Tensor:
        for e, w13, w2, _, _ in experts:
            torch.mm(x[e], w13.t(), out=hidden[e])
            torch.mm(act[e], w2.t(), out=y[e])
        return grad_w2_EDF

    def backward(out: Tensor) -> Sequence[Tensor]:
        for e, w13, w2, grad_w13, grad_w2 in experts:
            torch.mm(grad_y[e], w2, out=grad_act[e])
            torch.mm(grad_y[e].t(), act[e], out=grad_w2)
            torch.mm(grad_hidden[e], w13, out=grad_x[e])
            torch.mm(grad_hidden[e].t(), x[e], out=grad_w13)
        return []

    return Side(forward=forward, backward=backward)


PEERS = (
    Peer(name=OURS, build=ours),
    Peer(name="transformers grouped_mm", build=grouped_mm),
    Peer(name="transformers eager", build=eager),
    Peer(name="transformers batched_mm", build=batched_mm),
    Peer(name="dense MLP, same active FLOPs", build=dense, bound=True),
    Peer(name=FLOOR, build=bare_gemms, bound=True),
    Peer(name="bare GEMMs, one expert's weights", build=lambda p: bare_gemms(p, hot=True), bound=True),
)


def best_ms(steps: dict[str, Step], *, turns: int) -> dict[str, float]:
    """The best time of each step in ms. A step that takes over a second is run once more and no oftener."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(turns + 1):
        for name, step in steps.items():
            if turn > 1 and best[name] > 1e3:
                continue
            start = clock()
            step()
            if turn:  # the first turn warms up
                best[name] = min(best[name], (clock() - start) * 1e3)
    return best


def peak_bytes(step: Step) -> int:
    """The most that torch's allocator held at once during ``step``, beyond what it held before."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = step()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def kept_bytes(side: Side, p: Problem) -> int:
    """What autograd keeps between forward and backward, each storage once, the weights apart."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        side.forward()
    for weight in (p.w13_EGD, p.w2_EDF):
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def bench(shape: Shape, *, dtype: torch.dtype, turns: int) -> dict[str, Row]:
    """Every side of one shape, by name: a figure for each, or the reason why there is none."""
    p = make_problem(shape, "uniform", dtype=dtype, device="cpu")
    expected = reference(p, dtype=torch.float64)
    rows: dict[str, Row] = {}
    sides: dict[str, Side] = {}
    for peer in PEERS:
        try:
            side = peer.build(p)
            out = side.forward()
            got = [out.detach(), *side.backward(out)]
        except (Unfit, RuntimeError) as reason:
            rows[peer.name] = {"reason": f"cannot run: {str(reason).strip().partition(chr(10))[0][:100]}"}
            continue
        rows[peer.name] = {}
        if not peer.bound:
            rows[peer.name]["error"], wrong = disagreement(got, expected, dtype=dtype)
            if wrong is not None and not (dtype is torch.float32 and rows[peer.name]["error"] <= FP32_LIMIT):
                rows[peer.name]["reason"] = f"disagrees with the reference: {wrong}"
                continue
        sides[peer.name] = side

    def both(side: Side) -> Step:
        return lambda: side.backward(side.forward())

    with torch.no_grad():
        forward = best_ms({name: side.forward for name, side in sides.items()}, turns=turns)
    full = best_ms({name: both(side) for name, side in sides.items()}, turns=turns)
    for name, side in sides.items():
        rows[name] |= {"forward_ms": forward[name], "full_ms": full[name]}
        rows[name]["forward_per_floor"] = forward[name] / forward[FLOOR]
        rows[name]["full_per_floor"] = full[name] / full[FLOOR]
        if "bare" not in name:
            rows[name] |= {"peak_bytes": peak_bytes(both(side)), "kept_bytes": kept_bytes(side, p)}
    return rows


def show(rows: dict[str, Row]) -> None:
    print(
        f"{'':34}{'fwd ms':>9}{'x floor':>9}{'fwd+bwd ms':>12}{'x floor':>9}{'/ ours':>8}{'peak MB':>9}{'kept MB':>9}"
    )
    for name, row in rows.items():
        if "reason" in row:
            print(f"{name:34}  {row['reason']}")
            continue
        line = f"{name:34}{row['forward_ms']:9.1f}{row['forward_per_floor']:9.2f}"
        line += f"{row['full_ms']:12.1f}{row['full_per_floor']:9.2f}"
        line += f"{row['full_ms'] / rows[OURS]['full_ms']:8.2f}" if "full_ms" in rows[OURS] else f"{'':8}"
        if "peak_bytes" in row:
            line += f"{row['peak_bytes'] / 1e6:9.1f}{row['kept_bytes'] / 1e6:9.1f}"
        print(line, flush=True)


def crossover(shape: Shape, *, dtype: torch.dtype, turns: int) -> dict[str, Row]:
    """Both CPU paths, forward + backward: what :func:`moe_kernels.choose_regime` rests on."""
    p = make_problem(shape, "uniform", dtype=dtype, device="cpu")
    x, w13, w2, weights = p.leaves

    def step(path: Literal["sorted", "dense"]) -> Step:
        side = by_autograd(lambda: experts_layer(x, w13, w2, p.index_TK, weights, path=path), p.leaves, p.grad_out_TD)
        return lambda: side.backward(side.forward())

    full = best_ms({"sorted": step("sorted"), "dense": step("dense")}, turns=turns)
    return {path: {"full_ms": ms} for path, ms in full.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", help="T,E,K,D,F; by default the four of the table in docs/kernels.md")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--threads", default="1,2", help="one run for each, separated by commas")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--crossover", action="store_true", help="compare the two CPU paths instead")
    args = parser.parse_args(argv)
    named = SHAPES if args.shapes is None else dict(zip(args.shapes, args.shapes, strict=True))
    named = dict(zip(CROSSOVER, CROSSOVER, strict=True)) if args.crossover and args.shapes is None else named
    cells = []
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        for dtype_name in args.dtypes:
            for name, text in named.items():
                shape, dtype = parse_shape(text), getattr(torch, dtype_name)
                path = choose_regime(shape.experts, shape.top_k, width=shape.width, tokens=shape.tokens, dtype=dtype)
                print(f"\n{name}: {shape}, {dtype_name}, {threads} thread(s), path {path}", flush=True)
                if args.crossover:
                    rows = crossover(shape, dtype=dtype, turns=args.turns)
                    ms = {side: row["full_ms"] for side, row in rows.items()}
                    ratio = ms["dense"] / ms["sorted"]
                    units = shape.experts * shape.width / shape.top_k
                    print(f"E/K*F {units:.0f}: sorted {ms['sorted']:.1f} ms, dense {ms['dense']:.1f} ms, {ratio:.2f}")
                else:
                    rows = bench(shape, dtype=dtype, turns=args.turns)
                    show(rows)
                cell = {"shape": text, "dtype": dtype_name, "threads": threads, "path": path, "rows": rows}
                cells.append({"name": name, **cell})
                if args.json is not None:
                    about = {"torch": torch.__version__, "malloc": {k: os.environ.get(k) for k in MALLOC}}
                    args.json.write_text(json.dumps(about | {"cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
